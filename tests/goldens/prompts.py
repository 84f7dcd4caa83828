"""The texts whose logits and continuations the goldens hold."""

from collections.abc import Mapping

_FACTS = (
    "The {n}th entry of the ledger says that ship number {a} left the harbour of the old town with {b} crates"
    " of oranges, and that its captain paid {c} coins for the pilot who knew the channel.\n"
)
_LONG = "".join(_FACTS.format(n=n, a=17 * n % 101, b=31 * n % 89 + 2, c=7 * n % 53 + 1) for n in range(4, 31))

_CODE = '''import heapq


def shortest_path(graph, start, goal):
    """Dijkstra's algorithm over a dict of dicts."""
    queue = [(0, start, [])]
    seen = set()
    while queue:
        cost, node, path = heapq.heappop(queue)
'''

TEXTS: Mapping[str, str] = {
    "capital": "The capital of France is",
    "story": "Once upon a time, there was a little",
    "fibonacci": "def fibonacci(n):\n",
    "code": _CODE,
    "scripts": "日本の首都は東京です。Python 🐍 means fun 🎉! Привет, мир. 中国的首都是",
    "numbers": "1, 1, 2, 3, 5, 8, 13, 21,",
    "long": _LONG + "Question: how many coins did the captain of the last entry pay? Answer:",
}
"""Name to plain text."""

SINGLE_TOKEN = "The"
"""A prompt of one token."""

CHAT = ({"role": "user", "content": "Name three colours of the rainbow."},)
"""Messages, to be wrapped by the model's own chat template with a generation prompt."""
