"""What stages did when, for traces and logs: spans of steps, their sums, the trace file of Perfetto, JSON lines.

A span names the requests in its step, so that one request can be followed through all stages and machines. Knows
nothing of how steps are run.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from splitrun.engine.interface import StageStatus

SPANS_KEPT = 20_000
JSON_LOG_VARIABLE = "SPLITRUN_LOG"
_STEPS = logging.getLogger("splitrun.steps")


@dataclass(frozen=True)
class Span:
    """One stage's work on one step. ``start_s`` is on the clock of the process that recorded it (`time.monotonic`)."""

    stage: int
    step: int
    epoch: int
    tokens: int
    requests: tuple[int, ...]
    start_s: float
    seconds: float

    def to_list(self) -> list[Any]:
        """Plain values, for a message."""
        return [self.stage, self.step, self.epoch, self.tokens, list(self.requests), self.start_s, self.seconds]

    @classmethod
    def from_list(cls, values: Sequence[Any], offset_s: float) -> Span:
        """The inverse, on another clock; raises TypeError or ValueError."""
        stage, step, epoch, tokens, requests, start_s, seconds = values
        ids = tuple(int(one) for one in requests)
        return cls(int(stage), int(step), int(epoch), int(tokens), ids, float(start_s) + offset_s, float(seconds))


@dataclass
class StageClock:
    """Seconds that a stage spent on steps, how often it was started again, the steps that wait or run there, and the
    bytes of activations over the hop behind it; read by anyone. ``single_s`` and ``single_steps`` count the steps of
    one token alone."""

    last_s: float = 0.0
    total_s: float = 0.0
    steps: int = 0
    restarts: int = 0
    queued: int = 0
    sent_bytes: int = 0
    single_s: float = 0.0
    single_steps: int = 0

    def shown(self, stage: StageStatus, kept_bytes: int) -> StageStatus:
        """The stage's status with these figures."""
        return replace(
            stage,
            last_step_ms=self.last_s * 1e3,
            mean_step_ms=self.total_s * 1e3 / max(self.steps, 1),
            single_step_ms=self.single_s * 1e3 / max(self.single_steps, 1),
            single_steps=self.single_steps,
            restarts=self.restarts,
            queued=self.queued,
            sent_bytes=self.sent_bytes,
            kept_bytes=kept_bytes,
        )

    def add(self, seconds: float, tokens: int = 0) -> None:
        """Count one step of that many tokens."""
        if tokens == 1:
            self.single_s += seconds
            self.single_steps += 1
        self.last_s = seconds
        self.total_s += seconds
        self.steps += 1


class Record:
    """The newest spans of a process; any thread adds, any thread takes."""

    def __init__(self) -> None:
        self._spans: deque[Span] = deque(maxlen=SPANS_KEPT)

    def keep(self, span: Span) -> None:
        """Keep a span of another process, which has written its own line."""
        self._spans.append(span)

    def add(self, span: Span) -> None:
        """Keep a span, and write its line when logs are on."""
        self.keep(span)
        if _STEPS.isEnabledFor(logging.INFO):
            _STEPS.info("step", extra={"fields": {
                "stage": span.stage, "step": span.step, "epoch": span.epoch, "tokens": span.tokens,
                "requests": list(span.requests), "ms": round(span.seconds * 1e3, 3),
            }})  # fmt: skip

    def take(self) -> list[Span]:
        """The spans since the last time."""
        taken = []
        while self._spans:
            taken.append(self._spans.popleft())
        return taken


class _JsonLines(logging.Formatter):
    """One JSON object per line; ``where`` names the process."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self._where = where

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        fields = {"time": round(time.time(), 4), "level": record.levelname.lower(), "where": self._where}
        return json.dumps({**fields, "message": record.getMessage(), **getattr(record, "fields", {})})


def log_json(where: str) -> None:
    """Write this process's log as JSON lines to standard error, a line per step and stage included."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines(where))
    logger = logging.getLogger("splitrun")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def perfetto(spans: Iterable[Span], stages: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The trace as Chrome's trace events, which Perfetto opens: a process per machine, a thread per stage.

    ``stages``: (machine, what the stage is). Arrows lead from each stage's work on a step to the next stage's.
    """
    machines = list(dict.fromkeys(machine for machine, _ in stages))
    events: list[dict[str, Any]] = []
    for number, machine in enumerate(machines):
        events.append(_meta("process_name", number, 0, machine))
    for index, (machine, units) in enumerate(stages):
        events.append(_meta("thread_name", machines.index(machine), index, f"stage {index}: {units}"))
    ordered = sorted(spans, key=lambda span: (span.step, span.stage))
    start_s = min((span.start_s for span in ordered), default=0.0)
    for span in ordered:
        place = {"pid": machines.index(stages[span.stage][0]), "tid": span.stage}
        begin, length = (span.start_s - start_s) * 1e6, span.seconds * 1e6
        events.append({
            "name": f"step {span.step}", "cat": "step", "ph": "X", "ts": begin, "dur": length, **place,
            "args": {"requests": list(span.requests), "tokens": span.tokens, "epoch": span.epoch},
        })  # fmt: skip
        flow = {"name": "hop", "cat": "hop", "id": span.step, **place}
        if span.stage > 0:
            events.append({**flow, "ph": "f", "bp": "e", "ts": begin})
        if span.stage < len(stages) - 1:
            events.append({**flow, "ph": "s" if span.stage == 0 else "t", "ts": begin + length})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _meta(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
