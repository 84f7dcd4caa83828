"""Kernels over arrays, not requests: each a contract, a reference and its backends. Imports only JAX."""
