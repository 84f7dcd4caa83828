"""A small world as it was, to be brought back as often as one likes.

A snapshot is a pickle of all that is reachable from a world. Shared between the world and its copies are

- values: requests, plans, messages, statistics and the like, which nothing changes;
- arrays: each stays at its address, which agents and peers know, and gets its content back. So of a world and
  its copies only the one brought back last may be used.

Closures are made again with what they hold. So are agents, which are deleted when nobody refers to them: a
snapshot refers to none.
"""

import hashlib
import io
import logging
import pickle
import types
import weakref
from collections.abc import Callable
from enum import Enum
from typing import Any

import msgspec
import numpy as np

from jaxserve.dispatch import Pending
from jaxserve.sim.clients import Habits
from jaxserve.sim.device import StepFate
from jaxserve.sim.engine import Node, Weather
from jaxserve.sim.expect import Expected, SimTokenizer
from jaxserve.sim.fake_nixl import FakeNixlAgent, Fault, _deleted
from jaxserve.sim.hash_model import HashModel
from jaxserve.sim.steered import Variant
from jaxserve.transfer import Door
from kv.config import ConnectorConfig
from kv.driver import Region
from kv.moves import Lease, Load, RemoteSource, Store, Track, Unlease, Untrack
from kv.transfer_plan import EngineFacts, Piece
from metrics.counts import LabelledCounts
from metrics.engine import EngineStats
from metrics.moves import MoveStats
from scheduler.types import Limits, Plan, Request, SamplingParams, SchedulerConfig

VALUES = (
    *(Pending, Habits, StepFate, Node, Expected, Fault, HashModel, Variant, Door, ConnectorConfig, Region),
    *(Lease, Load, RemoteSource, Store, Track, Unlease, Untrack, EngineFacts, Piece),
    *(LabelledCounts, EngineStats, MoveStats, Limits, Plan, Request, SamplingParams, SchedulerConfig),
)
"""Classes whose objects, and all that these hold, never change."""
ALIKE = (
    *(type, BaseException, types.ModuleType, types.MappingProxyType, type(hashlib.blake2b())),
    *(logging.Logger, logging.Handler, Enum, Weather, SimTokenizer, msgspec.Struct, np.generic, np.dtype),
)
"""The same, with the classes below them."""


class Snapshot:
    """A world, or anything that leads to one, as it is now."""

    def __init__(self, world: object) -> None:
        pickled = io.BytesIO()
        pickler = _Pickler(pickled, 5)
        pickler.dump(world)
        self._shared = pickler.shared
        self._contents = [(array, array.copy()) for array in pickler.arrays if array.flags.writeable]
        self._pickled = pickled.getvalue()

    def back(self) -> Any:
        """The world as it was."""
        for array, content in self._contents:
            array[...] = content
        _lent.append(self._shared)
        try:
            return pickle.loads(self._pickled)
        finally:
            _lent.pop()


class _Pickler(pickle.Pickler):
    """Attributes: shared: what copies take by its number; arrays: those among it."""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.shared: list[object] = []
        self.arrays: list[np.ndarray] = []

    def reducer_override(self, obj: Any) -> Any:
        """See `pickle.Pickler`."""
        kind = type(obj)
        how = _HOW.get(kind)
        if how is None:
            how = _HOW[kind] = _how(kind)
        return how(self, obj)

    def share(self, obj: object) -> Any:
        """Copies have the same one."""
        self.shared.append(obj)
        return _take, (len(self.shared) - 1,)

    def array(self, obj: np.ndarray) -> Any:
        """Copies have the same one, with the content of now."""
        self.arrays.append(obj)
        return self.share(obj)

    def function(self, obj: types.FunctionType) -> Any:
        """Copies have one that holds copies."""
        if obj.__module__ == __name__:
            return NotImplemented
        if obj.__closure__ is None and not obj.__defaults__ and not obj.__kwdefaults__:
            return self.share(obj)
        held = (
            tuple(cell.cell_contents for cell in obj.__closure__ or ()),
            obj.__defaults__,
            obj.__kwdefaults__,
        )
        self.shared.append((obj.__code__, obj.__globals__))
        return _function, (len(self.shared) - 1,), held, None, None, _fill

    def agent(self, obj: FakeNixlAgent) -> Any:
        """Copies have one that lives as long as it is referred to."""
        return FakeNixlAgent.__new__, (FakeNixlAgent,), dict(vars(obj)), None, None, _live

    def plain(self, obj: object) -> Any:
        """As pickle does it."""
        return NotImplemented


_lent: list[list[object]] = []
"""What `_take` takes from, while a world is brought back."""


def _take(number: int) -> Any:
    return _lent[-1][number]


def _function(number: int) -> types.FunctionType:
    code, names = _take(number)
    return types.FunctionType(code, names, None, None, tuple(types.CellType() for _ in code.co_freevars))


def _fill(function: types.FunctionType, held: tuple[tuple[Any, ...], Any, Any]) -> None:
    cells, function.__defaults__, function.__kwdefaults__ = held
    for cell, content in zip(function.__closure__ or (), cells, strict=True):
        cell.cell_contents = content


def _live(agent: FakeNixlAgent, attributes: dict[str, Any]) -> None:
    vars(agent).update(attributes)
    weakref.finalize(agent, _deleted, weakref.ref(agent._network), agent._id).atexit = False


_HOW: dict[type, Callable[[_Pickler, Any], Any]] = {}


def _how(kind: type) -> Callable[[_Pickler, Any], Any]:
    if issubclass(kind, np.ndarray):
        return _Pickler.array
    if issubclass(kind, types.FunctionType):
        return _Pickler.function
    if issubclass(kind, FakeNixlAgent):
        return _Pickler.agent
    lock = kind.__module__ == "threading"  # nobody holds one between two events
    return _Pickler.share if lock or kind in VALUES or issubclass(kind, ALIKE) else _Pickler.plain
