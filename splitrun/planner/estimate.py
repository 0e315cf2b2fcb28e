"""What a plan is predicted to do and to hold: plain data, and its form in the placement file.

Knows nothing of how the figures are made (``memory.py``, ``cost.py``) or shown (``explain.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes that a plan takes on one device, by purpose, against the budget it promised to keep.

    ``context_bytes`` is what driver and runtime take before the first tensor (on a processor: the process),
    ``allocator_bytes`` what allocators round up, ``margin_bytes`` what is left free for safety, ``kept_bytes`` what is
    kept for stages that may be lost (see ``keeping.py``). Devices with the same ``memory_pool`` draw on one memory.
    """

    device: str
    memory_pool: str
    budget_bytes: int
    weight_bytes: int
    kv_bytes: int
    state_bytes: int
    workspace_bytes: int
    context_bytes: int
    allocator_bytes: int
    margin_bytes: int
    kept_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All items together."""
        return self.expected_bytes + self.margin_bytes

    @property
    def expected_bytes(self) -> int:
        """What the plan is expected to take at its highest: all items without the safety margin."""
        items = self.weight_bytes + self.kv_bytes + self.state_bytes
        return items + self.kept_bytes + self.workspace_bytes + self.context_bytes + self.allocator_bytes

    def items(self) -> tuple[tuple[str, int], ...]:
        """(name, bytes) of every item, as they are shown."""
        process = self.device.rpartition("/")[2].startswith("cpu")
        return (
            ("weights", self.weight_bytes),
            ("KV", self.kv_bytes + self.state_bytes),
            ("kept for recovery", self.kept_bytes),
            ("workspace", self.workspace_bytes),
            ("process" if process else "context", self.context_bytes),
            ("allocator", self.allocator_bytes),
            ("margin", self.margin_bytes),
        )


@dataclass(frozen=True)
class StageEstimate:
    """One stage: seconds for a decoded token and for the reference prompt, the hop to the next device apart."""

    device: str
    units: str
    weights: str
    weight_bytes: int
    kv_bytes: int
    decode_s: float
    prefill_s: float
    hop_s: float


@dataclass(frozen=True)
class Estimate:
    """Predictions for a whole plan.

    ``step_s`` and ``decode_tokens_per_s`` are one session's, alone, with ``history_tokens`` tokens in its cache;
    ``throughput_tokens_per_s`` is that of all sessions together, decoding in ``streams`` groups;
    ``time_to_first_token_s`` and ``prefill_tokens_per_s`` are for a prompt of ``prompt_tokens``. ``limit`` names the
    binding constraint. ``spread`` is how far, as a share, seconds of decoding may be off: the measured units' own, at
    least what such predictions were off, or that of a data sheet; ``first_token_spread`` those to the first token.
    """

    step_s: float
    decode_tokens_per_s: float
    throughput_tokens_per_s: float
    time_to_first_token_s: float
    prefill_tokens_per_s: float
    history_tokens: int
    prompt_tokens: int
    context: int
    sessions: int
    stages: tuple[StageEstimate, ...]
    devices: tuple[DeviceMemory, ...]
    limit: str = ""
    notes: tuple[str, ...] = ()
    spread: float = 0.0
    streams: int = 1
    first_token_spread: float = 0.0

    @property
    def decode_interval(self) -> tuple[float, float]:
        """Tokens per second of decoding, at least and at most."""
        return self.decode_tokens_per_s / (1 + self.spread), self.decode_tokens_per_s / max(1 - self.spread, 0.1)

    @property
    def first_token_interval(self) -> tuple[float, float]:
        """Seconds to the first token, at least and at most."""
        share = self.first_token_spread or self.spread
        return self.time_to_first_token_s * (1 - min(share, 0.9)), self.time_to_first_token_s * (1 + share)

    def to_dict(self) -> dict[str, Any]:
        """Plain mappings, lists and numbers; seconds and rates to six significant digits."""
        plain: dict[str, Any] = _rounded(asdict(self))
        return plain


def from_dict(data: object) -> Estimate | None:
    """The estimate that ``to_dict`` wrote, or None when anything about it is not as we write it."""
    if not isinstance(data, Mapping):
        return None
    rows, memories, notes = data.get("stages"), data.get("devices"), data.get("notes", [])
    if not isinstance(rows, list) or not isinstance(memories, list) or not isinstance(notes, list):
        return None
    stages = [_checked(StageEstimate, row) for row in rows]
    devices = [_checked(DeviceMemory, row) for row in memories]
    if None in stages or None in devices or not all(isinstance(note, str) for note in notes):
        return None
    nested = {"stages": tuple(stages), "devices": tuple(devices), "notes": tuple(notes)}
    return _checked(Estimate, {**data, **nested})


_LATER = ("spread", "kept_bytes", "streams", "first_token_spread")
"""Fields that estimates of earlier versions lack."""
Made = TypeVar("Made", StageEstimate, DeviceMemory, Estimate)


def _checked(kind: type[Made], data: object) -> Made | None:
    """``kind`` from a mapping with exactly its fields, each of its type, numbers finite and not negative."""
    if not isinstance(data, Mapping):
        return None
    data = {field.name: field.default for field in fields(kind) if field.name in _LATER} | dict(data)
    if set(data) != {field.name for field in fields(kind)}:
        return None
    values: dict[str, Any] = {}
    for field in fields(kind):
        value = data[field.name]
        if field.type == "float" and type(value) is int:
            value = float(value)
        accepted = {"int": int, "float": float, "str": str}.get(str(field.type), tuple)
        if type(value) is not accepted or (isinstance(value, int | float) and not 0 <= value < math.inf):
            return None
        values[field.name] = value
    return kind(**values)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
