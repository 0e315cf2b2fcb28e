"""Small models and machines, made of numbers, for the planner's tests."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from splitrun.planner.facts import (
    FORMATS,
    Cluster,
    Device,
    KVGroup,
    Link,
    ModelProfile,
    Objective,
    UnitProfile,
    Workload,
)
from splitrun.planner.seconds import DecodeLine, DeviceSeconds, UnitSeconds

MIB = 1 << 20
GIB = 1 << 30
BITS = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "nf4": 0.5625}


def formats_of(values: int, share: float = 1.0) -> dict[str, int]:
    """Bytes of ``values`` weights in every format, or of a share of them."""
    return {name: int(values * share * BITS[name]) for name in FORMATS}


def unit(name: str, values: int, kv: Mapping[str, int] | None = None, read: float = 1.0, **more: Any) -> UnitProfile:
    more = {"quantized_values": values} | more
    return UnitProfile(name, formats_of(values), formats_of(values, read), 2.0 * values * read, dict(kv or {}), **more)


def model(layers: int = 8, values: int = 10 * MIB, kv: int = 512, **more: Any) -> ModelProfile:
    """A dense model: ``layers`` equal layers, embed and head of the size of one."""
    rows = [unit(f"layer {i}", values, {"full": kv}, activation_values_per_token=2048) for i in range(layers)]
    facts: dict[str, Any] = {
        "source": "some/model",
        "revision": None,
        "fingerprint": "sha256:1234",
        "model_type": "qwen3",
        "units": (unit("embed", values, read=1e-4), *rows, unit("head", values)),
        "groups": (KVGroup("full"),),
        "hidden_values": 1024,
        "vocabulary": 32000,
        "max_context": 32768,
        "stored_format": "bf16",
    }
    return ModelProfile(**(facts | more))


def device(name: str = "cpu", budget: int = 8 * GIB, bandwidth: float = 28e9, **more: Any) -> Device:
    kind = "cuda" if name.startswith("cuda") else "cpu"
    facts: dict[str, Any] = {
        "name": name,
        "kind": kind,
        "description": name,
        "total_bytes": 2 * budget,
        "free_bytes": budget,
        "budget_bytes": budget,
        "memory_pool": name,
        "context_bytes": 256 * MIB if kind == "cuda" else 0,
        "bandwidth_bytes_per_s": bandwidth,
        "flops_per_s": bandwidth * 50,
        "unit_overhead_s": 50e-6,
        "compute_dtype": "bf16",
    }
    return Device(**(facts | more))


def random_model(draw: random.Random) -> ModelProfile:
    """Up to four uneven layers of all KV groups, tied or not."""
    groups = (KVGroup("full"), KVGroup("sliding", 100), KVGroup("state"))
    layers = []
    for index in range(draw.randint(1, 4)):
        kind = draw.choice(groups)
        kv = {} if kind.kind == "state" else {kind.name: draw.randint(1, 4) * 256}
        more = {"state_bytes": draw.randint(0, 2) * MIB} if kind.kind == "state" else {}
        read = draw.choice([1.0, 0.3])
        values = draw.randint(1, 40) * MIB
        more["activation_values_per_token"] = draw.randint(0, 4000)
        layers.append(unit(f"layer {index}", values, kv, read, **more))
    ends = draw.randint(1, 30) * MIB
    tied = formats_of(ends) if draw.random() < 0.5 else {}
    units = (unit("embed", ends, read=1e-4), *layers, unit("head", ends, largest_weight_values=ends))
    stored = draw.choice(["fp32", "bf16", "nf4"])
    return replace(model(), units=units, groups=groups, tied_bytes=tied, stored_format=stored)


def random_cluster(draw: random.Random) -> Cluster:
    """Up to three devices, sometimes drawing on one memory, with budgets from ample to hopeless."""
    names = draw.sample(["cpu", "cpu:1", "cuda:0", "cuda:1"], draw.randint(1, 3))
    shared = draw.random() < 0.4
    devices = [
        device(
            name,
            budget=draw.choice([60, 150, 300, 400, 600, 1000]) * MIB,
            bandwidth=draw.choice([10e9, 28e9, 300e9]),
            memory_pool="host" if shared and draw.random() < 0.8 else name,
            context_bytes=draw.choice([0, 20]) * MIB,
            unit_overhead_s=draw.choice([0.0, 1e-4]),
            compute_dtype=draw.choice(["bf16", "fp32"]),
            formats=draw.choice([FORMATS, ("bf16", "nf4"), ("bf16", "int8"), ("fp32", "fp16", "int8")]),
        )
        for name in names
    ]
    links = {}
    if draw.random() < 0.5:
        links = {(a, b): Link(draw.choice([1e-5, 1e-2]), 1e9) for a in names for b in names if a != b}
    return Cluster(tuple(devices), links)


def random_seconds(draw: random.Random, profile: ModelProfile, cluster: Cluster) -> ModelProfile:
    """The model as measured on some of the devices, in some of their formats; every stage takes its share."""

    def measured(scale: float) -> UnitSeconds:
        lines = tuple(DecodeLine(rows, rows**0.5 * scale * draw.uniform(0.5, 2), 1e-6 * scale) for rows in (1, 4))
        return UnitSeconds(lines, ((32, scale * draw.uniform(2, 4)), (512, scale * draw.uniform(4, 9))), 1e-7 * scale)

    seconds = {}
    for place in cluster.devices:
        for name in place.formats:
            if draw.random() < 0.6:
                units = tuple(measured(5e-3) for _ in profile.units)
                seconds[place.name, name] = DeviceSeconds(measured(draw.choice([1e-4, 5e-3])), units)
    return replace(profile, seconds=seconds)


def random_workload(draw: random.Random) -> Workload:
    objectives: tuple[Objective, ...] = ("latency", "throughput", "first-token")
    return Workload(
        context=draw.choice([64, 500, 4096]),
        sessions=draw.choice([1, 3]),
        objective=draw.choice(objectives),
        chunk_tokens=draw.choice([128, 512]),
        block_tokens=draw.choice([16, 64]),
    )
