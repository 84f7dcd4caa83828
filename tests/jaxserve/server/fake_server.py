"""`python -m tests.jaxserve.server.fake_server PORT SHUTDOWN_S STEP_S`: the fake engine behind `run`."""

import logging
import sys

from jaxserve.server import ServerOptions, run
from tests.jaxserve.server.fake_engine import FakeEngine


def main() -> int:
    logging.basicConfig(level=logging.INFO)
    port, shutdown_s, step_s = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    engine = FakeEngine()
    engine.step_s = step_s
    return run(engine, ServerOptions(port=port, shutdown_timeout_s=shutdown_s))


if __name__ == "__main__":
    sys.exit(main())
