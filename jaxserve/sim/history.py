"""Which faults have struck whom, and when: for laws that ask whether something can be explained."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf


@dataclass(slots=True, eq=False)
class Struck:
    """A fault that lasts. Attributes: hosts: the one that it struck first, those that notice it after it."""

    fault: str
    hosts: tuple[str, ...]


class History:
    """Keeps of each fault when it struck the same hosts last."""

    def __init__(self) -> None:
        self._last: dict[str, dict[tuple[str, ...], float]] = {}
        """Per fault and hosts; infinite while it lasts."""
        self._lasting: list[Struck] = []

    def strike(self, fault: str, hosts: tuple[str, ...], now: float) -> None:
        """A fault of a moment."""
        known = self._last.setdefault(fault, {})
        known[hosts] = max(known.get(hosts, now), now)

    def begin(self, fault: str, hosts: tuple[str, ...]) -> Struck:
        """A fault that lasts."""
        struck = Struck(fault, hosts)
        self._lasting.append(struck)
        self._last.setdefault(fault, {})[hosts] = inf
        return struck

    def end(self, struck: Struck, now: float) -> None:
        """It is over; nothing if it was before."""
        if struck not in self._lasting:
            return
        self._lasting.remove(struck)
        if not any(each.fault == struck.fault and each.hosts == struck.hosts for each in self._lasting):
            self._last[struck.fault][struck.hosts] = now

    def of_host(self, faults: Iterable[str], host: str, since: float) -> bool:
        """Whether one of these faults has struck a host itself since then, or lasts there."""
        return any(
            at >= since and hosts[0] == host
            for fault in faults
            for hosts, at in self._last.get(fault, {}).items()
        )

    def of_pair(self, faults: Iterable[str], one: str, other: str, since: float) -> bool:
        """Whether one of these faults has struck what goes on between two hosts since then, or lasts. They
        may be one: an engine that lends can read from itself."""
        pair = {one, other}
        return any(
            at >= since and len(hosts) == len(pair) and pair.issuperset(hosts)
            for fault in faults
            for hosts, at in self._last.get(fault, {}).items()
        )

    def near(self, host: str, since: float) -> set[str]:
        """Faults that have concerned a host since then, or do."""
        return {
            fault
            for fault, each in self._last.items()
            for hosts, at in each.items()
            if at >= since and host in hosts
        }
