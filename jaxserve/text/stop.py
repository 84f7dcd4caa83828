"""Stop strings in a stream of text."""

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class _Automaton:
    """Aho and Corasick's automaton (1975): one step per character, however many strings it looks for.

    State s stands for a prefix of some stop string: the longest that is a suffix of the text so far.

    Attributes:
        edges: per state, the next state for each character that extends the prefix.
        fallback: per state, the state of its longest proper suffix that is a prefix too.
        depth: per state, characters in the prefix.
        found: per state, index of the first listed stop string that ends here; None: none does.
    """

    edges: tuple[dict[str, int], ...]
    fallback: tuple[int, ...]
    depth: tuple[int, ...]
    found: tuple[int | None, ...]

    def after(self, state: int, character: str) -> int:
        """The state once `character` has been read."""
        while (target := self.edges[state].get(character)) is None and state:
            state = self.fallback[state]
        return target or 0


def _automaton(stops: tuple[str, ...]) -> _Automaton:
    edges: list[dict[str, int]] = [{}]
    depth, found = [0], list[int | None]([None])
    for index, stop in enumerate(stops):
        state = 0
        for character in stop:
            target = edges[state].get(character)
            if target is None:
                target = len(edges)
                edges[state][character] = target
                edges.append({})
                depth.append(depth[state] + 1)
                found.append(None)
            state = target
        if found[state] is None:
            found[state] = index
    fallback = [0] * len(edges)
    waiting = deque(edges[0].values())
    while waiting:
        state = waiting.popleft()
        for character, target in edges[state].items():
            back = fallback[state]
            while back and character not in edges[back]:
                back = fallback[back]
            fallback[target] = edges[back].get(character, 0)
            shorter = found[fallback[target]]
            if shorter is not None:
                own = found[target]
                found[target] = shorter if own is None else min(own, shorter)
            waiting.append(target)
    return _Automaton(edges=tuple(edges), fallback=tuple(fallback), depth=tuple(depth), found=tuple(found))


class StopStrings:
    """Finds the first stop string in the text of one growing sequence. Owned by one thread.

    The match is the one that is complete first; of several complete at the same character, the first in the
    list. So the outcome does not depend on how the text is cut into pushes. Cost per character is constant.
    """

    def __init__(self, stops: tuple[str, ...], include: bool = False) -> None:
        """Look for `stops`; with `include` the text keeps the one that is found.

        Raises:
            ValueError: an empty stop string.
        """
        if "" in stops:
            raise ValueError("a stop string must not be empty")
        self._stops = stops
        self._include = include
        self._automaton = _automaton(stops)
        self._state = 0
        self._held = ""
        self._hit: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Take more text; return what is certain to precede any stop string, and the stop string found.

        Text after the match is dropped, and pushes after it return `("", hit)`.
        """
        if self._hit is not None or not self._stops:
            return ("" if self._hit is not None else text), self._hit
        automaton, state = self._automaton, self._state
        for position, character in enumerate(text):
            state = automaton.after(state, character)
            index = automaton.found[state]
            if index is not None:
                self._hit = self._stops[index]
                seen = self._held + text[: position + 1]
                self._held = ""
                return (seen if self._include else seen[: len(seen) - len(self._hit)]), self._hit
        self._state = state
        seen = self._held + text
        certain = len(seen) if self._include else len(seen) - automaton.depth[state]
        self._held = seen[certain:]
        return seen[:certain], None

    def flush(self) -> str:
        """End the text; return what was held back as the possible start of a stop string."""
        held, self._held = self._held, ""
        return held
