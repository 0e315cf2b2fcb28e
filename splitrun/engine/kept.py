"""KV of stages in other processes, kept here while their requests run: what a stage that is lost gets back.

Rows come in order from each stage and are kept up to a limit per stage; where one was not kept, what follows it is of
no use. Knows rows of numbers, neither layers nor blocks.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Collection, Mapping

import torch
from torch import Tensor


class _Rows:
    """The first tokens of one request at one stage, in pieces."""

    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.tokens = 0

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    def cut(self, tokens: int) -> None:
        """Keep no more than that."""
        while self.tokens > tokens:
            last = self.pieces.pop()
            self.tokens -= last.shape[0]
            if self.tokens < tokens:
                self.append(last[: tokens - self.tokens].clone())

    def append(self, rows: Tensor) -> None:
        self.pieces.append(rows)
        self.tokens += rows.shape[0]


class KeptKV:
    """``limits``: stage -> most bytes to keep of it; 0: nothing. Any thread."""

    def __init__(self, limits: Mapping[int, int]) -> None:
        self._limits = dict(limits)
        self._rows: dict[int, dict[int, _Rows]] = {stage: {} for stage in limits}
        self._bytes = dict.fromkeys(limits, 0)
        self._requests: set[int] = set()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of everything kept."""
        return sum(self._bytes.values())

    def stage_bytes(self, stage: int) -> int:
        """Bytes kept of one stage."""
        return self._bytes.get(stage, 0)

    def begin(self, requests: Collection[int]) -> None:
        """These requests run: keep what comes of them."""
        with self._lock:
            self._requests.update(requests)

    def forget(self, request: int) -> None:
        """The request has ended."""
        with self._lock:
            self._requests.discard(request)
            for stage, held in self._rows.items():
                gone = held.pop(request, None)
                self._bytes[stage] -= 0 if gone is None else gone.nbytes

    def drop(self, stages: Collection[int]) -> None:
        """Keep nothing of these stages any more."""
        with self._lock:
            for stage in stages:
                self._limits.pop(stage, None)
                self._rows.pop(stage, None)
                self._bytes.pop(stage, None)

    def take(self, stage: int, request: int, start: int, rows: Tensor) -> None:
        """Keep the rows of a request's tokens from ``start`` on, in place of what was kept of them and later ones."""
        with self._lock:
            if request not in self._requests or stage not in self._rows:
                return
            held = self._rows[stage].setdefault(request, _Rows())
            if start > held.tokens:
                return
            before = held.nbytes
            held.cut(start)
            self._bytes[stage] += held.nbytes - before
            if self._bytes[stage] + rows.nbytes <= self._limits[stage]:
                held.append(rows)
                self._bytes[stage] += rows.nbytes

    def has_kv(self, stage: int) -> bool:
        """Whether the stage has KV at all."""
        return stage in self._limits

    def tokens(self, stages: Collection[int], request: int) -> int:
        """How many first tokens of a request are kept of all these stages; of no stages, all that there ever are."""
        with self._lock:
            nothing = _Rows()
            return min((self._rows[stage].get(request, nothing).tokens for stage in stages), default=sys.maxsize)

    def rows(self, stage: int, request: int, start: int, stop: int) -> Tensor:
        """The rows of these tokens, as many as are kept still. Shape: (tokens, values)."""
        with self._lock:
            found, first = [], 0
            for piece in self._rows[stage].get(request, _Rows()).pieces:
                part = piece[max(0, start - first) : max(0, stop - first)]
                first += piece.shape[0]
                if part.shape[0]:
                    found.append(part)
        return torch.cat(found) if found else torch.empty((0, 0))
