"""Frozen statistics, pure reducers over them, and their Prometheus exposition. Imports nothing of ours."""
