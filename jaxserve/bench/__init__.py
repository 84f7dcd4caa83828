"""Measures servers and the engine.

`serve` drives OpenAI endpoints over HTTP, `latency` and `throughput` the engine in process. Each has
`add_arguments(parser)` and `run(args) -> int`, mounted by the command line as `jaxserve bench NAME`.
`stats`, `tables` and `datasets` are pure. The engine is passed to `latency.run` and `throughput.run`.
"""
