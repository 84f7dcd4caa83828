"""One load from a peer, and how far it has come."""

from dataclasses import dataclass
from enum import Enum

import numpy as np

from kv.digest import digest_rows
from kv.driver import PageCopies
from kv.moves import Load, Loaded, RemoteSource
from kv.transfer_agent import Measured
from kv.transfer_leases import page_digests
from kv.transfer_plan import EngineFacts, Piece, pieces, regroup


class Stage(Enum):
    """Where a load is."""

    HANDSHAKE = "handshake"
    POST = "post"
    TRANSFER = "transfer"
    VERIFY = "verify"

    @property
    def broken(self) -> str:
        """`Loaded.stage` of a load that was cut off here. Only a peer's own answer can fail the verification:
        pages that nobody has vouched for are not known to be stale."""
        return self.value if self is Stage.HANDSHAKE else Stage.TRANSFER.value


@dataclass(frozen=True, slots=True)
class Stuck:
    """A transfer given up that may still write `num_pages` pages of the pool (or only staging `rows`).

    Attributes: transfer: None: it has failed, and only the deletion of its agent ends it for certain.
    """

    move_id: int
    transfer: int | None
    num_pages: int
    rows: list[int]
    since_s: float


class Fetch:
    """One load under way: pieces in the order of positions, moved and verified batch by batch.

    Attributes:
        batch: pieces being moved. rows: their staging rows, one per page of the peer.
        greeted: a handshake has been asked for on its account.
        turn: grows with every batch, so that an answer to an earlier one is known as such.
        failed: its transfer that failed and may still write, until the agent is deleted.
    """

    def __init__(self, load: Load, source: RemoteSource, page_size: int, deadline: float) -> None:
        self.load = load
        self.source = source
        self.deadline = deadline
        self.stage = Stage.HANDSHAKE
        self.greeted = False
        self.retries = 0
        self.batch: tuple[Piece, ...] = ()
        self.rows: list[int] = []
        self.staged = source.page_size != page_size
        self.transfer = 0
        self.failed: Stuck | None = None
        self.turn = 0
        self._ratio = page_size // source.page_size
        self._pieces, self._covered = pieces(load, source, page_size) if self._ratio else ((), 0)
        self._verified = 0
        self._good: tuple[Piece, ...] = ()
        self._digests: list[bytes] = []
        self._digest_failures = 0
        self._moved = Measured(num_bytes=0, num_descriptors=0, seconds=0.0, post_seconds=0.0)

    @property
    def fresh(self) -> bool:
        """It waits for no answer, only for its turn."""
        return self.stage is Stage.HANDSHAKE and not self.greeted

    @property
    def finished(self) -> bool:
        """Every piece that the source holds is here and verified."""
        return self._verified == len(self._pieces)

    @property
    def short(self) -> str | None:
        """Why positions are missing although every piece came."""
        wanted = len(self.load.pages[0])
        if self._covered == wanted:
            return None
        return f"the peer's lease covers {self._covered} of {wanted} pages"

    def restart(self) -> None:
        """Again from the handshake; what is verified stays."""
        self.turn += 1
        self.stage, self.greeted, self.batch = Stage.HANDSHAKE, False, ()

    def next_batch(self) -> None:
        """On to the pieces that had no room."""
        self.turn += 1
        self.stage, self.batch = Stage.POST, ()

    def take_batch(self, free_rows: list[int] | None) -> None:
        """Chooses the next pieces: all, or as many as staging has rows for, which are taken."""
        left = self._pieces[self._verified :]
        if free_rows is None:
            self.batch = left
            return
        count, needed = 0, 0
        while count < len(left) and needed + len(left[count].pages) <= len(free_rows):
            needed += len(left[count].pages)
            count += 1
        self.batch = left[:count]
        self.rows = free_rows[:needed]
        del free_rows[:needed]

    def measured(self, moved: Measured) -> None:
        """Adds up transfers."""
        self._moved = Measured(
            num_bytes=self._moved.num_bytes + moved.num_bytes,
            num_descriptors=self._moved.num_descriptors + moved.num_descriptors,
            seconds=self._moved.seconds + moved.seconds,
            post_seconds=self._moved.post_seconds + moved.post_seconds,
        )

    def digest(self, copies: PageCopies, facts: EngineFacts, staging: np.ndarray | None) -> None:
        """Digests of what has landed, in the order of the batch's pages."""
        if staging is not None:
            self._digests = digest_rows(staging[self.rows])
        else:
            self._digests = page_digests(copies, facts, [piece.target for piece in self.batch])

    def settle(self, digests: tuple[tuple[bytes, ...], ...] | None) -> int:
        """Compares with the peer's digests, per group in the order of the batch; None: not wanted.

        Returns:
            pieces that differ. Leading good pieces count as verified.
        """
        bad = [False] * len(self.batch)
        if digests is not None:
            theirs = [iter(group) for group in digests]
            ours = iter(self._digests)
            for index, piece in enumerate(self.batch):
                expected = theirs[piece.group] if piece.group < len(theirs) else iter(())
                pairs = [(next(ours), next(expected, None)) for _ in piece.pages]
                bad[index] = any(mine != his for mine, his in pairs)
        good = bad.index(True) if True in bad else len(bad)
        self._good = self.batch[:good]
        self._verified += good
        self._digest_failures += sum(bad)
        return sum(bad)

    def write_staged(self, copies: PageCopies, staging: np.ndarray, facts: EngineFacts) -> None:
        """Regroups the good pieces of the batch and copies them into the pool."""
        first = 0
        for piece in self._good:
            rows = staging[self.rows[first : first + len(piece.pages)]]
            first += len(piece.pages)
            page = regroup(rows, self._ratio, facts.page_shape, facts.item_bytes)
            copies.write([piece.target], page[None])

    def loaded(self, error: str | None, stage: str, *, safe: bool) -> Loaded:
        """The load's event, now."""
        num_pages = self._covered if self.finished else self._pieces[self._verified].position
        return Loaded(
            move_id=self.load.move_id,
            num_pages=num_pages,
            safe=safe,
            error=error,
            stage=stage,
            num_bytes=self._moved.num_bytes,
            num_descriptors=self._moved.num_descriptors,
            seconds=self._moved.seconds,
            post_seconds=self._moved.post_seconds,
            digest_failures=self._digest_failures,
            retries=self.retries,
        )
