"""The placement file, version 1: reading it strictly and writing it so that a person likes to edit it.

Only ``version``, ``model.source`` and ``stages`` with devices and ranges are required. Knows nothing of the machine
or the model; an ``estimate`` is kept only while it still describes the stages beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from splitrun.planner import estimate as estimates
from splitrun.planner.destination import write_whole
from splitrun.planner.facts import FORMATS, KV_TYPES, Objective, Workload
from splitrun.planner.placement import (
    MAX_COUNT,
    MAX_STREAMS,
    OBJECTIVES,
    STREAM_FROM_TOKENS,
    VERSION,
    KVSpec,
    ModelRef,
    Placement,
    StageSpec,
    device_fault,
    is_processor,
    tiling_fault,
)
from splitrun.planner.yaml_fields import Field, read_root
from splitrun.quantities import parse_budget

_TOP = ("version", "model", "workload", "block_tokens", "streams", "stages", "devices", "estimate")
_OF = "of"
"""Of an estimate: a digest of what it was made for."""
_STAGE = ("device", "units", "layers", "weights", "kv", "threads", "stream_buffer", "stream_from")


def read(file: Path) -> Placement:
    """The placement in ``file``; raises InvalidPlacement naming file, line and key."""
    top = read_root(file).members(_TOP, required=("version", "model", "stages"))
    if top["version"].integer(0, MAX_COUNT) != VERSION:
        top["version"].fail(f"this splitrun reads version {VERSION}; plan again with: splitrun plan MODEL -o {file}")
    model = _model(top["model"])
    entries = top["stages"].entries()
    if not entries:
        top["stages"].fail("must list at least one stage")
    rows = [_StageRow(entry) for entry in entries]
    layers = model.layers or max((row.layers[1] for row in rows if row.layers), default=0)
    stages = tuple(row.stage(layers) for row in rows)
    fault = tiling_fault(stages, layers)
    if fault:
        rows[fault[0]].range_field.fail(fault[1])
    workload = _workload(top)
    budgets = _budgets(top.get("devices"))
    streams = top["streams"].integer(1, MAX_STREAMS) if "streams" in top else None
    placement = Placement(VERSION, model, workload, stages, budgets, streams=streams)
    return replace(placement, estimate=_estimate(top.get("estimate"), placement))


def _model(field: Field) -> ModelRef:
    members = field.members(("source", "revision", "layers", "fingerprint"), required=("source",))
    layers = members.get("layers")
    return ModelRef(
        source=members["source"].text(),
        revision=_optional_text(members.get("revision")),
        layers=None if layers is None or layers.is_null() else layers.integer(1, MAX_COUNT),
        fingerprint=_optional_text(members.get("fingerprint")),
    )


def _workload(top: Mapping[str, Field]) -> Workload:
    values: dict[str, Any] = {}
    if "workload" in top:
        members = top["workload"].members(("context", "sessions", "objective", "chunk_tokens"))
        for name, most in (("context", MAX_COUNT), ("sessions", 1 << 16), ("chunk_tokens", MAX_COUNT)):
            if name in members:
                values[name] = members[name].integer(1, most)
        if "objective" in members:
            values["objective"] = cast(Objective, members["objective"].choice(OBJECTIVES))
    if "block_tokens" in top:
        values["block_tokens"] = top["block_tokens"].integer(1, 1 << 16)
    return Workload(**values)


class _StageRow:
    """One entry under ``stages``, before the number of layers is known."""

    def __init__(self, field: Field) -> None:
        self.members = field.members(_STAGE, required=("device",))
        self.range_field = self.members.get("layers") or self.members.get("units") or field
        self.names = self._unit_names()
        self.layers = self._layers()
        if not self.names and self.layers is None:
            field.fail("the stage computes nothing; give it layers: [first, end], or units: [embed] or [head]")

    def _unit_names(self) -> list[str]:
        if "units" not in self.members:
            return []
        entries = self.members["units"].entries()
        names = [entry.choice(("embed", "head")) for entry in entries]
        if len(names) != len(set(names)) or names != sorted(names):
            self.members["units"].fail("embed and head may each be named once, embed first")
        if not names:
            self.members["units"].fail("must name embed, head or both; leave it out for a stage of layers alone")
        return names

    def _layers(self) -> tuple[int, int] | None:
        if "layers" not in self.members:
            return None
        field = self.members["layers"]
        entries = field.entries()
        if len(entries) != 2:
            field.fail("must be [first, end], half-open: [0, 6] is layers 0 to 5")
        start, stop = (entry.integer(0, MAX_COUNT) for entry in entries)
        if start >= stop:
            field.fail(f"[{start}, {stop}] is empty; the end must be above the first layer")
        return start, stop

    def stage(self, layers: int) -> StageSpec:
        """The stage; head alone stands after the last of ``layers`` layers."""
        members, embed, head = self.members, "embed" in self.names, "head" in self.names
        edge = 0 if embed else layers
        threads = members.get("threads")
        return StageSpec(
            device=_device(members["device"]),
            embed=embed,
            layers=self.layers or (edge, edge),
            head=head,
            weights=members["weights"].choice(FORMATS) if "weights" in members else "bf16",
            kv=_kv(members["kv"], members["device"].text()) if "kv" in members else KVSpec(),
            threads=_threads(threads) if threads else "auto",
            stream_buffer_bytes=members["stream_buffer"].size() if "stream_buffer" in members else 0,
            stream_from_tokens=_stream_from(members.get("stream_from")),
        )


def _threads(field: Field) -> int | Literal["auto"]:
    if isinstance(field.node, yaml.ScalarNode) and field.node.value == "auto":
        return "auto"
    return field.integer(1, 4096)


def _stream_from(field: Field | None) -> int:
    return STREAM_FROM_TOKENS if field is None else field.integer(STREAM_FROM_TOKENS, MAX_COUNT)


def _kv(field: Field, device: str) -> KVSpec:
    members = field.members(("dtype", "device_blocks", "host_blocks", "disk_blocks"))
    dtype, device_blocks = members.get("dtype"), members.get("device_blocks")
    if dtype is not None and not is_processor(device) and not dtype.is_null() and dtype.choice(KV_TYPES) == "int8":
        dtype.fail(f"int8 keys and values are for processors, not {device}; leave dtype out")
    return KVSpec(
        dtype=None if dtype is None or dtype.is_null() else cast(Any, dtype.choice(KV_TYPES)),
        device_blocks=None if device_blocks is None or device_blocks.is_null() else device_blocks.integer(1, MAX_COUNT),
        host_blocks=members["host_blocks"].integer(0, MAX_COUNT) if "host_blocks" in members else 0,
        disk_blocks=members["disk_blocks"].integer(0, MAX_COUNT) if "disk_blocks" in members else 0,
    )


def _device(field: Field) -> str:
    name = field.text()
    fault = device_fault(name)
    if fault:
        field.fail(fault)
    return name


def _budgets(field: Field | None) -> dict[str, int]:
    if field is None or field.is_null():
        return {}
    budgets = {}
    for name, entry in field.members(None).items():
        fault = device_fault(name)
        if fault:
            entry.fail(fault)
        memory = entry.members(("memory",), required=("memory",))["memory"]
        budgets[name] = memory.size(parse_budget)
        if budgets[name] == 0:
            memory.fail("must be more than 0")
    return budgets


def _optional_text(field: Field | None) -> str | None:
    return None if field is None or field.is_null() else field.text()


def _estimate(field: Field | None, placement: Placement) -> estimates.Estimate | None:
    """The estimate in the file, with the budgets as they are now; None where the rest of the file was changed since."""
    stored = field.plain() if field and field.is_mapping() else None
    if not isinstance(stored, dict) or stored.pop(_OF, None) != _digest(to_mapping(placement)):
        return None
    found = estimates.from_dict(stored)
    if found is None:
        return None
    bills = (
        replace(bill, budget_bytes=placement.devices.get(bill.device, bill.budget_bytes)) for bill in found.devices
    )
    return replace(found, devices=tuple(bills))


def _digest(content: Mapping[str, Any]) -> str:
    """What an estimate is of: all that the file says but budgets and which version of the model it is."""
    model = {"source": content["model"]["source"], "layers": content["model"]["layers"]}
    rest = {name: value for name, value in content.items() if name not in ("devices", "estimate")}
    return "sha256:" + hashlib.sha256(json.dumps({**rest, "model": model}, sort_keys=True).encode()).hexdigest()[:16]


def to_mapping(placement: Placement) -> dict[str, Any]:
    """The file's content as plain mappings and lists, in the file's order."""
    model, workload = placement.model, placement.workload
    content: dict[str, Any] = {
        "version": placement.version,
        "model": {
            "source": model.source,
            "revision": model.revision,
            "layers": placement.layers,
            "fingerprint": model.fingerprint,
        },
        "workload": {
            "context": workload.context,
            "sessions": workload.sessions,
            "objective": workload.objective,
            "chunk_tokens": workload.chunk_tokens,
        },
        "block_tokens": workload.block_tokens,
        **({} if placement.streams is None else {"streams": placement.streams}),
        "stages": [_stage_mapping(stage) for stage in placement.stages],
    }
    if placement.devices:
        content["devices"] = {name: {"memory": _size(budget)} for name, budget in placement.devices.items()}
    if placement.estimate:
        content["estimate"] = {_OF: _digest(content), **placement.estimate.to_dict()}
    return content


def dump(placement: Placement) -> str:
    """The file's text. Reading it gives an equal placement (the estimate's figures to six digits)."""
    lines = []
    for key, value in to_mapping(placement).items():
        if key == "stages":
            lines += ["stages:", *(f"  - {_flow(stage)}" for stage in value)]
        elif key == "estimate":
            plain = {key: value}
            lines.append(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=2000).rstrip())
        else:
            lines.append(f"{key}: {_flow(value) if isinstance(value, dict) else value}")
    return "\n".join(lines) + "\n"


def write(placement: Placement, file: Path) -> None:
    """Write the file whole or not at all; raises InvalidPlacement naming the file and the reason."""
    write_whole(file, dump(placement))


def _stage_mapping(stage: StageSpec) -> dict[str, Any]:
    entry: dict[str, Any] = {"device": stage.device}
    names = ["embed"] * stage.embed + ["head"] * stage.head
    if names:
        entry["units"] = names
    if stage.layers[0] < stage.layers[1]:
        entry["layers"] = list(stage.layers)
    entry["weights"] = stage.weights
    cache = {
        "dtype": stage.kv.dtype,
        "device_blocks": stage.kv.device_blocks,
        "host_blocks": stage.kv.host_blocks or None,
        "disk_blocks": stage.kv.disk_blocks or None,
    }
    cache = {name: value for name, value in cache.items() if value is not None}
    if cache:
        entry["kv"] = cache
    if stage.threads != "auto":
        entry["threads"] = stage.threads
    if stage.stream_buffer_bytes:
        entry["stream_buffer"] = _size(stage.stream_buffer_bytes)
    if stage.stream_from_tokens != STREAM_FROM_TOKENS:
        entry["stream_from"] = stage.stream_from_tokens
    return entry


def _size(count: int) -> str | int:
    """ "4GiB" where that is exact, else plain bytes."""
    for factor, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= factor and count % factor == 0:
            return f"{count // factor}{unit}"
    return count


def _flow(value: object) -> str:
    """``value`` on one line."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6).strip()
