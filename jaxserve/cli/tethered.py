"""`python -m jaxserve.cli.tethered ...`: jaxserve as a child that ends with its parent.

The parent holds the other end of our standard input. However it ends, even killed, the pipe closes then; no
signal of the kernel's is needed, so that this works on every system.
"""

import os
import signal
import sys
import threading
import time

from jaxserve.cli import main

GRACE_S = 60.0
"""More than a drain takes by default."""


def tie() -> None:
    """Ends this process as SIGTERM does when standard input is closed, and by force if it does not go."""
    threading.Thread(target=_end_at_eof, name="tether", daemon=True).start()


def _end_at_eof() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    tie()
    sys.exit(main())
