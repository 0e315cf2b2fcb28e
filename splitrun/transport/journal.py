"""What a stage has sent to a stage in another process, kept while its sequences run: that one may be lost.

A row per token, found by slot and position. Memory is taken as positions are first written. Knows tensors and places,
not what is done with them.
"""

from __future__ import annotations

import numpy
import torch
from torch import Tensor

from splitrun.schedule.step import Step


class Journal:
    """Activations of ``slots`` sequences of up to ``context`` tokens."""

    def __init__(self, slots: int, context: int) -> None:
        self._slots = slots
        self._context = context
        self._rows: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of everything that it may hold, 0 before the first."""
        return 0 if self._rows is None else self._rows.nbytes

    def keep(self, step: Step, activation: Tensor) -> None:
        """Keep the activation of a step's tokens. ``activation`` is on the CPU. Shape: (tokens, hidden)."""
        if self._rows is None:
            shape = (self._slots * self._context, activation.shape[1])
            self._rows = torch.empty(shape, dtype=activation.dtype)
        self._rows[self._places(step)] = activation

    def read(self, step: Step) -> Tensor:
        """What was kept of a step's tokens. Shape: (tokens, hidden)."""
        assert self._rows is not None, "nothing was ever sent"
        return self._rows[self._places(step)]

    def _places(self, step: Step) -> Tensor:
        counts = step.counts
        within = numpy.arange(len(step.token_ids)) - numpy.repeat(step.query_starts[:-1], counts)
        firsts = step.slots.astype(numpy.int64) * self._context + step.context_lengths
        return torch.from_numpy(numpy.repeat(firsts, counts) + within)
