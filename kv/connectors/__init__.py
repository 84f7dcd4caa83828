"""Decisions of the connectors: where tokens can be had, what is stored, who keeps pages for a peer. Pure."""
