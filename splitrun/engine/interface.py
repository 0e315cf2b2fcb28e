"""What a server needs of an engine: submit token ids, receive token events, ask how it does.

Knows nothing of how tokens are computed, and nothing of text or HTTP. ``EngineStatus`` is plain data that survives a
trip through JSON, because the HTTP process reads it from another process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from splitrun.schedule.request import Request, TokenEvent


@dataclass(frozen=True)
class BlockUse:
    """Blocks of one KV group."""

    used: int
    total: int


@dataclass(frozen=True)
class StageStatus:
    """One stage as it is now. ``node`` is the machine, "" for the coordinator's own. ``last_step_ms`` and
    ``mean_step_ms`` are 0 before its first step. ``restarts`` counts how often its process was lost and started
    again, ``queued`` the steps that wait or run there, ``sent_bytes`` the activations over the hop behind it.
    ``single_step_ms`` is the mean of ``single_steps`` steps that had one token alone. ``kept_bytes`` are kept by the
    coordinator for the case that the stage is lost: its KV, and what it was sent."""

    device: str
    units: str
    memory_bytes: int = 0
    last_step_ms: float = 0.0
    mean_step_ms: float = 0.0
    restarts: int = 0
    node: str = ""
    queued: int = 0
    sent_bytes: int = 0
    single_step_ms: float = 0.0
    single_steps: int = 0
    kept_bytes: int = 0


@dataclass(frozen=True)
class EngineStatus:
    """How the engine does.

    ``healthy`` holds once a real token went through all stages and while the engine lives; otherwise ``reason`` says
    what is missing. ``prompt_tokens`` and ``completion_tokens`` count since the start. ``placement`` is the plan as
    its file would show it.
    """

    healthy: bool
    reason: str = ""
    context: int = 0
    vocabulary: int = 0
    running: int = 0
    waiting: int = 0
    blocks: Mapping[str, BlockUse] = field(default_factory=dict)
    preemptions: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    stages: tuple[StageStatus, ...] = ()
    placement: Mapping[str, Any] = field(default_factory=dict)
    epoch: int = 0

    def to_json(self) -> dict[str, Any]:
        """Nested dictionaries, lists, numbers and strings only."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> EngineStatus:
        """The inverse of ``to_json``; raises TypeError, KeyError or AttributeError when the value is not one."""
        fields = dict(value)
        fields["blocks"] = {name: BlockUse(**use) for name, use in fields.get("blocks", {}).items()}
        fields["stages"] = tuple(StageStatus(**stage) for stage in fields.get("stages", ()))
        return cls(**fields)


class TokenEngine(Protocol):
    """An engine that turns requests into token events. Every method may be called from any thread.

    ``context`` is the longest sequence (prompt and new tokens), ``vocabulary`` the number of token ids.
    """

    @property
    def context(self) -> int:
        """Tokens that one sequence may hold, prompt and completion together."""

    @property
    def vocabulary(self) -> int:
        """Token ids run from 0 to this number, exclusive."""

    def submit(self, request: Request, deliver: Callable[[TokenEvent], None]) -> None:
        """Queue a request. ``deliver`` is called from the engine's thread, in order; the last event of a request has
        a ``finish_reason``. Raises a RequestError (ContextTooLong, QueueFull, InvalidRequest), or a StageError when
        the engine is dead or draining; then no event follows.
        """

    def cancel(self, request_id: int) -> None:
        """Forget a request: its blocks are free at once and no further events come. Unknown ids are ignored."""

    def status(self) -> EngineStatus:
        """How the engine does now. Quick: it never waits for a running step."""

    def drain(self) -> None:
        """Refuse new requests, finish the running ones, return when idle."""
