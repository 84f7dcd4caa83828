"""What a page is, who holds it and how it moves.

Pure half (imports nothing of ours): `types`, `pages`, `prefix`, `layout`.
Effect half (imports JAX): `pool`.
"""
