"""A child of `--disaggregated` without a model: answers as P or as D, by its role; prints its flags."""

import json
import signal
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jaxserve.cli.tethered import tie

PARAMS = {"do_remote_prefill": True}


def flag(name: str) -> str:
    """The last value of a flag, as argparse takes it."""
    last = len(sys.argv) - 1 - sys.argv[::-1].index(name)
    return sys.argv[last + 1]


def main() -> None:
    role = json.loads(flag("--kv-transfer-config"))["kv_role"]
    if "--fail" in sys.argv and role == "kv_consumer":
        sys.exit(7)

    async def complete(request: Request) -> Response:
        body = await request.json()
        if role == "kv_producer":
            return JSONResponse({"kv_transfer_params": PARAMS})
        return JSONResponse({"got": body["kv_transfer_params"]})

    async def well(request: Request) -> Response:
        return Response()

    async def die(request: Request) -> Response:
        sys.stdout.flush()
        server.force_exit = server.should_exit = True
        return Response()

    app = Starlette(
        routes=[
            Route("/health", well),
            Route("/ready", well),
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/tokenize", die, methods=["POST"]),
        ]
    )
    tie()
    print("flags", *sys.argv[1:], flush=True)
    server = uvicorn.Server(uvicorn.Config(app, port=int(flag("--port")), log_level="warning", ws="none"))
    # uvicorn raises the signal again when it has ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        server.run()
    finally:
        print("ended", flush=True)
    sys.exit(3 if server.force_exit else 0)


if __name__ == "__main__":
    main()
