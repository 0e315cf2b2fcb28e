"""Gives stages that were started again the KV that was kept of them, before anything is computed.

Each stage gets one piece at a time and says when it is in place. Knows frames, not how stages come back.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy

from splitrun.engine.kept import KeptKV
from splitrun.schedule.scheduler import Held
from splitrun.transport.frames import Frame
from splitrun.transport.messages import KVRows, kv_frame

PIECE_TOKENS = 512


@dataclass(frozen=True)
class _Piece:
    """Some tokens of a sequence for one stage."""

    held: Held
    start: int
    stop: int


class Restoration:
    """``send`` sends a frame to the process of a stage. ``resume`` is told, once all is in place, how many first tokens
    of each request all stages have, and which stages are to compute the rest (none named: all). ``journals``: the
    others can pass on what they sent before. Any thread.
    """

    def __init__(
        self,
        kept: KeptKV,
        session: int,
        send: Callable[[int, Frame], bool],
        resume: Callable[[Mapping[int, int], Collection[int]], None],
        *,
        journals: bool = False,
    ) -> None:
        self._kept = kept
        self._session = session
        self._send = send
        self._resume = resume
        self._journals = journals
        self._lost: set[int] = set()
        self._empty: set[int] = set()
        self._refill: set[int] = set()
        self._strange: dict[int, set[int]] = {}  # stage -> requests that it has not computed from their start
        self._pieces: dict[int, deque[_Piece]] = {}
        self._awaited: dict[int, int] = {}  # stage -> number of the piece that is on its way
        self._numbers = 0
        self._ends: Mapping[int, int] = {}
        self._lock = threading.Lock()
        self.losses = 0

    @property
    def waiting(self) -> bool:
        """Whether some piece is not in place yet."""
        return bool(self._awaited)

    def lose(self, stages: Iterable[int], tell: Callable[[], None]) -> None:
        """These stages have lost what they had. ``tell`` says so before anything is resumed again."""
        with self._lock:
            self.losses += 1
            self._pieces, self._awaited = {}, {}
            self._lost.update(stages)
            self._empty = {stage for stage in self._lost if self._kept.has_kv(stage)}
            tell()

    def forget(self, request: int) -> None:
        """The request has ended."""
        with self._lock:
            self._kept.forget(request)
            for requests in self._strange.values():
                requests.discard(request)

    def begin(self, loss: int, held: Iterable[Held]) -> None:
        """Give the stages that came back from that loss their KV of the sequences. Passed over when another loss has
        followed meanwhile."""
        with self._lock:
            if loss != self.losses:
                return
            held = list(held)
            self._choose(held)
            known = [(one, min(one.tokens, self._kept.tokens(self._empty, one.request_id))) for one in held]
            self._ends = {one.request_id: tokens for one, tokens in known}
            pieces = [
                _Piece(one, start, min(tokens, start + PIECE_TOKENS))
                for one, tokens in known
                for start in range(0, tokens, PIECE_TOKENS)
            ]
            self._pieces = {stage: deque(pieces) for stage in self._empty}
            for stage in self._empty:
                self._next(stage)
            self._resume_if_done()

    def placed(self, frame: Frame) -> None:
        """A stage has put a piece in place."""
        with self._lock:
            if self._awaited.get(frame.stage) == frame.step:
                del self._awaited[frame.stage]
                self._next(frame.stage)
                self._resume_if_done()

    def _choose(self, held: list[Held]) -> None:
        """Which stages compute again: the lost ones, those still about it, and stages before them that cannot pass on
        what they sent, because they were started again too."""
        if not self._journals:
            return
        requests = {one.request_id for one in held}
        for stage in self._lost:
            self._strange.setdefault(stage, set()).update(requests)
        self._refill = self._empty | (self._refill if any(one.refilling for one in held) else set())
        for stage in sorted(self._strange, reverse=True):
            if stage + 1 in self._refill and self._strange[stage] & requests:
                self._refill.add(stage)

    def _next(self, stage: int) -> None:
        """Send the next piece, passing over those of requests that have ended meanwhile."""
        while self._pieces[stage]:
            piece = self._pieces[stage].popleft()
            rows = self._kept.rows(stage, piece.held.request_id, piece.start, piece.stop)
            if rows.shape[0] < piece.stop - piece.start:
                continue
            tables = {name: numpy.array(ids, numpy.int32) for name, ids in piece.held.tables.items()}
            self._numbers += 1
            self._awaited[stage] = self._numbers
            kv = KVRows(piece.held.request_id, piece.start, rows, piece.held.slot, tables)
            self._send(stage, kv_frame(self._session, stage, 0, self._numbers, kv))
            return

    def _resume_if_done(self) -> None:
        if not self._awaited:
            self._lost.clear()
            self._empty.clear()
            self._resume(self._ends, self._refill)
