"""Seconds of units: run one real unit of each distinct shape with the very stage that will run it, and watch the clock.

Weights are random and lie in several copies, so that each run finds them in memory as decoding does and not in a cache
from the run before. Medians, with the width of the middle half of the runs. Never the whole model. Knows steps and
stages; knows nothing of plans, and where results are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from splitrun.measure.speed import synchronizer
from splitrun.measure.unit_steps import Point, make_step, pool_blocks
from splitrun.model.cut import CutModel, CutRange
from splitrun.model.dummy import DummySource
from splitrun.model.structure import ModelStructure
from splitrun.model.weights import Loader
from splitrun.stage.generic import RangeStage
from splitrun.stage.load import StageSize, load_stage

COLD_BYTES = 96 << 20
"""Weights that copies of a unit hold together at least, or one and a half times the last cache where that is more."""
MOST_COPIES = 8
POINT_SECONDS = 0.35
"""What is spent on one point; at least ``LEAST_RUNS`` runs."""
LEAST_RUNS, MOST_RUNS = 5, 60


@dataclass(frozen=True)
class Sample:
    """Seconds of one kind of step: the median of the runs, and half the width of their middle half as its share."""

    seconds: float
    spread: float


@dataclass(frozen=True)
class Setting:
    """Where and how units are timed. ``kind`` is the device's ("cpu", "cuda", …), ``device`` torch's name of it."""

    kind: str
    device: str
    dtype: str
    weights: str
    block_tokens: int


def time_units(
    config: Any,
    structure: ModelStructure,
    cut: CutRange,
    setting: Setting,
    points: Sequence[Point],
    unit_bytes: int,
) -> dict[Point, Sample]:
    """Seconds of a stage of that range for each point. Called on the thread that owns the device.

    ``unit_bytes`` is what the range's weights take: it decides how many copies are made.
    """
    slots = max(point.rows for point in points)
    blocks = pool_blocks(points, setting.block_tokens)
    size = StageSize(
        device=setting.device,
        dtype=setting.dtype,
        kv_dtype=setting.dtype,
        blocks={group.name: blocks for group in structure.groups if group.kind != "state"},
        block_tokens=setting.block_tokens,
        slots=slots,
    )
    copies = copies_needed(unit_bytes, setting.kind)
    stages = [load_stage(config, structure, cut, size, lambda model: _fill(model, setting)) for _ in range(copies)]
    settle = synchronizer(torch, setting.kind, setting.device) if setting.kind != "cpu" else _nothing
    try:
        return {point: _time_point(stages, structure, setting, blocks, point, settle) for point in points}
    finally:
        for stage in stages:
            stage.close()


def copies_needed(unit_bytes: int, kind: str) -> int:
    """Copies of a unit that together do not fit the last cache."""
    wanted = max(COLD_BYTES, last_cache_bytes() * 3 // 2) if kind == "cpu" else COLD_BYTES
    return max(1, min(MOST_COPIES, -(-wanted // max(unit_bytes, 1))))


def last_cache_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Size of the processor's last cache, 0 where the system does not say."""
    sizes = [0]
    for file in folder.glob("index*/size"):
        try:
            text = file.read_text(encoding="ascii").strip()
        except OSError:
            continue
        number, unit = text[:-1], text[-1:]
        if number.isdecimal() and unit in ("K", "M"):
            sizes.append(int(number) << (10 if unit == "K" else 20))
    return max(sizes)


def _fill(model: CutModel, setting: Setting) -> int:
    skeleton = model.skeleton.model
    loader = Loader(skeleton, DummySource.of(skeleton), model.dtype)
    return loader.load(model.own_names, setting.weights, setting.device).nbytes


def _time_point(
    stages: Sequence[RangeStage],
    structure: ModelStructure,
    setting: Setting,
    blocks: int,
    point: Point,
    settle: Callable[[], None],
) -> Sample:
    step = make_step(point, structure.groups, setting.block_tokens, blocks)
    incoming = _activation(stages[0], structure.hidden, point)

    def run(stage: RangeStage) -> None:
        stage.run(step, incoming)
        settle()

    for stage in stages:
        run(stage)
    return sample(run, stages, POINT_SECONDS)


def sample(run: Callable[[Any], None], subjects: Sequence[Any], spend_s: float) -> Sample:
    """The runs' median and spread; ``subjects`` take turns."""
    times: list[float] = []
    until = time.perf_counter() + spend_s
    while len(times) < LEAST_RUNS or (time.perf_counter() < until and len(times) < MOST_RUNS):
        subject = subjects[len(times) % len(subjects)]
        start = time.perf_counter()
        run(subject)
        times.append(time.perf_counter() - start)
    low, middle, high = quantiles(times, n=4)
    return Sample(median(times), (high - low) / 2 / max(middle, 1e-12))


def _activation(stage: RangeStage, hidden: int, point: Point) -> Tensor | None:
    """What the stage before would hand over. Shape: (rows * tokens, hidden); None with an embedding."""
    if stage.model.cut.embed:
        return None
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((point.rows * point.tokens, hidden), generator=generator)
    return values.to(stage.model.device, stage.model.dtype)


def _nothing() -> None:
    """The CPU has done what was asked of it when the call returns."""


def figures(samples: Mapping[Point, Sample]) -> dict[str, float]:
    """For the cache: two numbers per point."""
    flat: dict[str, float] = {}
    for point, found in samples.items():
        flat[point.name] = found.seconds
        flat[f"{point.name} spread"] = found.spread
    return flat


def samples_of(kept: Mapping[str, float], points: Sequence[Point]) -> dict[Point, Sample]:
    """The points that the cache has."""
    return {
        point: Sample(kept[point.name], kept.get(f"{point.name} spread", 0.0)) for point in points if point.name in kept
    }
