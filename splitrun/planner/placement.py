"""A placement: which device computes which units of a model, in execution order.

The constructor proves that the stages hold ``embed``, every layer and ``head`` exactly once, in order. Unit 0 is
``embed``, unit i + 1 is layer i, unit n + 1 is ``head``; ranges are half-open. Knows nothing of the machine at hand:
whether the plan still suits it is asked in ``check.py``. The file form is in ``placement_file.py``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from splitrun.errors import InvalidPlacement
from splitrun.planner.estimate import Estimate
from splitrun.planner.facts import FORMATS, KV_TYPES, Workload
from splitrun.quantities import MAX_BYTES

VERSION = 1
ValueType = Literal["fp32", "bf16", "fp16"]
KVType = Literal["fp32", "bf16", "fp16", "int8"]
STREAM_FROM_TOKENS = 32
"""Where nothing is planned: copying the weights for fewer tokens takes longer than computing with them in place."""
MAX_COUNT = 1 << 24
"""No context, block count or layer number is larger, so a larger figure is a typing error."""
MAX_STREAMS = 1 << 10
OBJECTIVES = ("latency", "throughput", "first-token")
_INDEX = r"(?:0|[1-9][0-9]{0,3})"
_DEVICE = re.compile(
    rf"(?:[A-Za-z0-9][A-Za-z0-9._-]{{0,62}}/)?(?:cpu(?::[1-9][0-9]{{0,3}})?|(?:cuda|xpu):{_INDEX}|mps)"
)


def is_processor(device: str) -> bool:
    """Whether a device of that name is a processor, here or on a node."""
    return device.rpartition("/")[2].startswith("cpu")


@dataclass(frozen=True)
class ModelRef:
    """The model: directory or Hub id, revision, number of layers, and fingerprint (None: not recorded)."""

    source: str
    revision: str | None = None
    layers: int | None = None
    fingerprint: str | None = None


@dataclass(frozen=True)
class KVSpec:
    """KV cache of a stage. None is decided at load: the stage's compute type; what context x sessions need."""

    dtype: KVType | None = None
    device_blocks: int | None = None
    host_blocks: int = 0
    disk_blocks: int = 0

    def __post_init__(self) -> None:
        _require(self.dtype is None or self.dtype in KV_TYPES, f"kv.dtype {self.dtype!r}", "fp32, bf16, fp16 or int8")
        for name in ("device_blocks", "host_blocks", "disk_blocks"):
            count = getattr(self, name)
            least = 1 if name == "device_blocks" else 0
            _require(count is None or least <= count <= MAX_COUNT, f"kv.{name} {count}", f"{least} to {MAX_COUNT}")


@dataclass(frozen=True)
class StageSpec:
    """One device and one run of units: ``embed``, the layers of a half-open range (empty: (k, k)), ``head``.

    ``stream_buffer_bytes`` of a card are slabs for the weights of layers on the processor; ``stream_from_tokens`` of a
    stage on the processor is the shortest chunk of a prompt that is computed with them.
    """

    device: str
    embed: bool
    layers: tuple[int, int]
    head: bool
    weights: str = "bf16"
    kv: KVSpec = field(default_factory=KVSpec)
    threads: int | Literal["auto"] = "auto"
    stream_buffer_bytes: int = 0
    stream_from_tokens: int = STREAM_FROM_TOKENS

    def __post_init__(self) -> None:
        fault = device_fault(self.device)
        if fault:
            raise InvalidPlacement(fault)
        start, stop = self.layers
        _require(0 <= start <= stop <= MAX_COUNT, f"layers {list(self.layers)}", "[first, end] with 0 <= first <= end")
        _require(self.weights in FORMATS, f"weights {self.weights!r}", "one of " + ", ".join(FORMATS))
        _require(self.threads == "auto" or 1 <= self.threads <= 4096, f"threads {self.threads}", "auto or 1 to 4096")
        _require(0 <= self.stream_buffer_bytes <= MAX_BYTES, f"stream_buffer {self.stream_buffer_bytes}", "0 or more")
        least, found = STREAM_FROM_TOKENS, self.stream_from_tokens
        _require(least <= found <= MAX_COUNT, f"stream_from {found}", f"{least} to {MAX_COUNT}")
        allowed = self.kv.dtype != "int8" or is_processor(self.device)
        _require(allowed, f"kv.dtype int8 on {self.device}", "a 16-bit type or fp32: int8 is for processors")

    @property
    def units(self) -> range:
        """The stage's units by number; a stage of head alone must carry layers (n, n)."""
        return range(0 if self.embed else self.layers[0] + 1, self.layers[1] + 1 + self.head)

    @property
    def units_text(self) -> str:
        """ "embed + layers 0–13 + head": the last layer named is computed here."""
        start, stop = self.layers
        middle = {0: "", 1: f"layer {start}"}.get(stop - start, f"layers {start}–{stop - 1}")
        return " + ".join(part for part in ("embed" * self.embed, middle, "head" * self.head) if part)


@dataclass(frozen=True)
class Placement:
    """Stages in execution order, with the workload they were planned for and the budgets they keep.

    ``devices`` maps a device to its budget in bytes; empty: whatever is free. ``streams`` is the number of groups that
    sessions decode in, each a step of its own, so that devices work at the same time; None: one per device. Raises
    InvalidPlacement.
    """

    version: int
    model: ModelRef
    workload: Workload
    stages: tuple[StageSpec, ...]
    devices: Mapping[str, int] = field(default_factory=dict)
    estimate: Estimate | None = None
    streams: int | None = None

    def __post_init__(self) -> None:
        _require(self.version == VERSION, f"version {self.version}", f"{VERSION}")
        _require(bool(self.model.source), "model.source ''", "a directory or a Hub id")
        _require(self.model.layers is None or self.model.layers >= 1, f"model.layers {self.model.layers}", "1 or more")
        _require_workload(self.workload)
        _require(
            self.streams is None or 1 <= self.streams <= MAX_STREAMS, f"streams {self.streams}", f"1 to {MAX_STREAMS}"
        )
        fault = tiling_fault(self.stages, self.layers)
        if fault:
            raise InvalidPlacement(f"stages[{fault[0]}]: {fault[1]}")
        for name, budget in self.devices.items():
            name_fault = device_fault(name)
            if name_fault:
                raise InvalidPlacement(f"devices: {name_fault}")
            _require(0 < budget <= MAX_BYTES, f"devices[{name!r}].memory {budget}", "more than 0")

    @property
    def layers(self) -> int:
        """Number of layers: the model's, or the largest end when the file does not say."""
        return self.model.layers or max((stage.layers[1] for stage in self.stages), default=0)

    @property
    def device_names(self) -> tuple[str, ...]:
        """The devices that compute, each once, in the order of their first stage."""
        return tuple(dict.fromkeys(stage.device for stage in self.stages))

    @property
    def kv(self) -> Literal["auto", "int8"]:
        """As planning is asked for it: "int8" where a stage keeps K and V so."""
        return "int8" if any(stage.kv.dtype == "int8" for stage in self.stages) else "auto"

    def has_device(self, name: str) -> bool:
        """Whether a stage runs on that device."""
        return name in self.device_names

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Placement:
        """The placement in that file; raises InvalidPlacement naming file, line and key."""
        from splitrun.planner.placement_file import read  # here, because the reader builds Placement

        return read(Path(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file whole or not at all: what was there before stays when writing fails (InvalidPlacement)."""
        from splitrun.planner.placement_file import write  # here, because the writer reads Placement

        write(self, Path(path))

    def to_json(self) -> str:
        """The file's content as one line of JSON."""
        from splitrun.planner.placement_file import to_mapping  # here, because it reads Placement

        return json.dumps(to_mapping(self), ensure_ascii=False)

    def explain(self) -> str:
        """The plan in words, a table and bars, from the stored estimate alone."""
        from splitrun.planner.explain import explain  # here, because it explains Placement

        return explain(self)


def device_fault(name: str) -> str | None:
    """Why ``name`` cannot name a device, or None."""
    if _DEVICE.fullmatch(name):
        return None
    return f"{name[:80]!r} is not a device; devices are cpu, cpu:1, cuda:0, xpu:0, mps, and NODE/cpu, NODE/cuda:0"


def tiling_fault(stages: Sequence[StageSpec], layers: int) -> tuple[int, str] | None:
    """The first stage that breaks the tiling of embed, layer 0 … layers - 1, head, and why; None when it holds."""
    expected = 0
    for index, stage in enumerate(stages):
        start, stop = stage.layers
        if stop > layers:
            return index, f"layers [{start}, {stop}] go beyond the model's {layers} layers"
        if stage.embed and start != 0:
            return index, f"embed comes before layer 0, but the layers of this stage start at {start}"
        if stage.head and stop != layers:
            return index, f"head comes after layer {layers - 1}, but the layers of this stage end before {stop}"
        units = stage.units
        if len(units) == 0:
            return index, "the stage computes nothing; give it layers: [first, end], or units: [embed] or [head]"
        if units.start < expected:
            return index, f"{unit_name(units.start, layers)} is computed twice; stages are listed in model order"
        if units.start > expected:
            return index, f"{unit_name(expected, layers)} is missing; it must come before this stage"
        expected = units.stop
    if expected != layers + 2 or layers == 0:
        return max(len(stages) - 1, 0), f"{unit_name(expected, layers)} is missing after the last stage"
    return None


def unit_name(unit: int, layers: int) -> str:
    """ "embed", "layer 3" or "head"."""
    return "embed" if unit == 0 else "head" if unit > layers else f"layer {unit - 1}"


def _require_workload(workload: Workload) -> None:
    limits = (("context", MAX_COUNT), ("sessions", 1 << 16), ("chunk_tokens", MAX_COUNT), ("block_tokens", 1 << 16))
    for name, most in limits:
        value = getattr(workload, name)
        _require(1 <= value <= most, f"{name} {value}", f"1 to {most}")
    _require(workload.objective in OBJECTIVES, f"objective {workload.objective!r}", "one of " + ", ".join(OBJECTIVES))


def _require(holds: bool, what: str, allowed: str) -> None:
    if not holds:
        raise InvalidPlacement(f"{what} is not allowed; allowed: {allowed}")
