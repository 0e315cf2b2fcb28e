"""A stage's KV on its way to the coordinator, behind the steps, and back into a stage that was started again.

After a step the KV of 16 further tokens of a sequence goes off, if the line takes it now; else with the next ones: the
blocks hold it as long as the sequence runs. Knows stages and steps, not what the coordinator keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from splitrun.schedule.blocks import REPLAY_TOKENS
from splitrun.schedule.step import Step
from splitrun.stage.generic import RangeStage
from splitrun.transport.frames import Frame
from splitrun.transport.messages import KVRows, kv_frame

FRAME_TOKENS = 64
"""Most tokens in a frame: activations on their way wait behind a part of one."""


class Shipping:
    """``stages``: those whose KV is shipped, by index. Everything runs on the stages' worker."""

    def __init__(self, session: int, stages: Mapping[int, RangeStage], send: Callable[[Frame], bool]) -> None:
        self._session = session
        self._stages = stages
        self._send = send
        self._sent: dict[tuple[int, int], tuple[int, int]] = {}  # (stage, slot) -> (request, tokens)

    def after(self, index: int, step: Step) -> None:
        """Send off what a step has completed."""
        if index not in self._stages:
            return
        for row, request in enumerate(step.requests):
            context = int(step.context_lengths[row])
            end = context + int(step.counts[row])
            if end // REPLAY_TOKENS > context // REPLAY_TOKENS:
                self._ship(index, step, row, request, context, end)

    def restored(self, index: int, slot: int, request: int, tokens: int) -> None:
        """The coordinator has that much of a sequence already."""
        self._sent[index, slot] = (request, tokens)

    def _ship(self, index: int, step: Step, row: int, request: int, context: int, end: int) -> None:
        slot = int(step.slots[row])
        known, sent = self._sent.get((index, slot), (None, 0))
        start = min(sent, context) if known == request else 0
        tables = {name: table[row] for name, table in step.block_tables.items()}
        while start < end:
            stop = min(end, start + FRAME_TOKENS)
            rows = self._stages[index].export(tables, start, stop)
            if not self._send(kv_frame(self._session, index, step.epoch, 0, KVRows(request, start, rows))):
                break
            start = stop
        self._sent[index, slot] = (request, start)
