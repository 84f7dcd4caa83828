"""What a page is, who holds it and how it moves.

Pure half, values in and values out: what pages are and who holds them (`types`, `pages`, `prefix`, `layout`),
moves (`moves`, `ledger`, `tier`, `eviction`, `connectors`), and what engines say to each other (`config`,
`wire`, `frames`, `seal`, `channel`, `digest`, `driver`, `transfers` and its parts).
Effect half: `pool` and `copies` (JAX and memory), `host` (copying threads), `nixl`, `tcp_channel`, and `auth`
(files).
"""
