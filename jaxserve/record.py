"""A record of every step's inputs, on disk, for `jaxserve replay`."""

import logging
from collections.abc import Mapping
from pathlib import Path

from scheduler.record import Replayed, decode, digest, encode_entry, encode_header, encode_inputs, replay
from scheduler.types import Inputs, Limits, Plan, SchedulerConfig

logger = logging.getLogger("jaxserve")


class RecordFile:
    """Appends one frame per step; each is flushed, so that a killed engine leaves a readable record.

    A disk that is full ends the record, not the engine.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(
        self,
        path: Path,
        config: SchedulerConfig,
        limits: Limits,
        engine: Mapping[str, str | int | bool] | None = None,
    ) -> None:
        """Args: engine: see `scheduler.record.Header`."""
        self._file = path.open("wb")
        self._broken = False
        frame, self._digest = encode_header(config, limits, engine)
        self._file.write(frame)
        self._file.flush()

    def write(self, inputs: Inputs, plan: Plan) -> None:
        """Takes one step; called by the engine's loop."""
        if self._broken:
            return
        encoded = encode_inputs(inputs)
        self._digest = digest(self._digest, encoded, plan)
        try:
            self._file.write(encode_entry(encoded, self._digest))
            self._file.flush()
        except OSError:
            self._broken = True
            logger.exception("the record ends here: %s cannot be written", self._file.name)

    def close(self) -> None:
        """Ends the record."""
        try:
            self._file.close()
        except OSError:
            logger.exception("the end of %s could not be written", self._file.name)


def replay_file(path: Path) -> Replayed:
    """Runs a record again and compares every step.

    Raises:
        RecordError: the record is damaged, or a step differs.
        OSError: the file cannot be read.
    """
    return replay(decode(path.read_bytes()))
