"""Seconds of units: run one real unit of each distinct shape with the very stage that will run it, and watch the clock.

Weights are random and lie in several copies, so that each run finds them in memory as decoding does and not in a cache
from the run before. Medians, with the width of the middle half of the runs. Never the whole model. Knows steps and
stages; knows nothing of plans, and where results are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, inf
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from splitrun.kernels.weight import Weight
from splitrun.measure.peaks import held_bytes, peak_beyond, peak_of
from splitrun.measure.resident import give_back
from splitrun.measure.speed import release, synchronizer
from splitrun.measure.thread_count import settle_threads
from splitrun.measure.unit_steps import Point, make_step, pool_blocks
from splitrun.model.cut import CutModel, CutRange
from splitrun.model.dummy import RepeatedSource
from splitrun.model.structure import ModelStructure
from splitrun.model.weights import Loader
from splitrun.stage.generic import RangeStage
from splitrun.stage.load import StageSize, load_stage
from splitrun.transport.local import Worker

COLD_BYTES = 96 << 20
"""Weights that copies of a unit hold together at least; more where the last cache is large."""
PROCESSOR_CACHES, CARD_CACHES = 2.0, 4.0
"""How many last caches they fill. These drop lines at random: of what is read round and round and is w times as large,
a share h is found again, with h = exp(-w (1 - h)): a third for w = 1.7, a fifth for 2, one in fifty for 4."""
MOST_COPIES = 12
MISSING_SHARE = 0.1
"""Of a copy that may be missing from that."""
BETWEEN_BYTES = 48 << 20
"""What a processor reads between two runs of an end without layers: those of others have emptied the inner caches,
of Python's own memory too, before an end runs in earnest."""
COMPUTED_TOKENS, COMPUTED_COPIES = 256, 2
"""What a processor reads for so many tokens of a prompt keeps it computing for so long that this many copies do."""
POINT_SECONDS = 0.15
"""What is spent on one point; at least ``LEAST_RUNS`` runs."""
LEAST_RUNS, MOST_RUNS = 5, 200
PROMPTS_SECONDS, MOST_PROMPTS = 0.25, 4
"""What is spent on whole prompts to see what memory they take, and how many they are at most."""
FEWEST_RUNS = 3
"""Of a point that takes more than twice its time."""


@dataclass(frozen=True)
class Sample:
    """Seconds of one kind of step: the median of the runs, and half the width of their middle half as its share.

    ``peak_bytes`` is what one such step takes beside weights and KV, at its highest.
    """

    seconds: float
    spread: float
    peak_bytes: int = 0


@dataclass(frozen=True)
class Setting:
    """Where and how units are timed. ``kind`` is the device's ("cpu", "cuda", …), ``device`` torch's name of it.

    ``threads`` are the CPU threads of the worker, None on an accelerator; where it ``settles``, it decodes with the
    fastest number, as an engine's worker does that has the processor to itself: with ``fast`` of them where that is
    known. ``copies`` is how many stages take turns. ``kv_dtype`` is the type of stored K and V, None: ``dtype``.
    """

    kind: str
    device: str
    dtype: str
    weights: str
    block_tokens: int
    threads: int | None = None
    copies: int = 1
    settles: bool = False
    fast: int | None = None
    kv_dtype: str | None = None


class UnitBench:
    """Stages of one range, loaded on a worker of their own as an engine's are, ready to be timed again and again.

    ``load_bytes`` is what loading took at its highest beyond what is loaded, ``fast`` the number of threads that were
    settled on, None where that is not asked for, ``chunk_step`` the stage's.
    """

    def __init__(
        self, config: Any, structure: ModelStructure, cut: CutRange, setting: Setting, points: Sequence[Point]
    ) -> None:
        """Loads; raises what loading raises. ``points`` are all that will ever be timed."""
        self._structure = structure
        self._setting = setting
        self._blocks = pool_blocks(points, setting.block_tokens)
        size = StageSize(
            device=setting.device,
            dtype=setting.dtype,
            kv_dtype=setting.kv_dtype or setting.dtype,
            blocks={group.name: self._blocks for group in structure.groups if group.kind != "state"},
            block_tokens=setting.block_tokens,
            slots=max(point.rows for point in points),
        )
        self._settle = synchronizer(torch, setting.kind, setting.device) if setting.kind != "cpu" else _nothing
        self._stages: list[RangeStage] = []
        self.load_bytes = 0
        self.fast: int | None = None
        self._worker = Worker(setting.device, setting.threads)
        made: dict[str, Weight] = {}

        def load() -> None:
            self._stages.append(load_stage(config, structure, cut, size, lambda model: _fill(model, setting, made)))

        with ExitStack() as undo:
            undo.callback(self.close)
            for _ in range(setting.copies):
                peak = self._worker.call(partial(peak_beyond, load, setting.kind, setting.device))
                self.load_bytes = max(self.load_bytes, peak)
            if setting.settles and setting.threads is not None:
                settle = partial(settle_threads, self._stages, setting.block_tokens, setting.threads, fast=setting.fast)
                self.fast = self._worker.call(settle)
            for stage in self._stages:  # or pages of KV that come while steps run would count as theirs
                self._worker.call(stage.clear_kv)
            undo.pop_all()
        self.chunk_step = self._stages[0].chunk_step
        self._held = self._worker.call(partial(held_bytes, setting.kind, setting.device))
        self._reads_between = setting.kind == "cpu" and cut.start == cut.stop

    def time(self, points: Sequence[Point], spend_s: float | None = None, peaks: bool = True) -> dict[Point, Sample]:
        """Seconds of a stage of the range for each point, in about ``spend_s`` each; with ``peaks``, bytes too."""
        spend_s = POINT_SECONDS if spend_s is None else spend_s
        found: dict[Point, int] = {}
        if peaks:  # before the other copies run, each of which keeps buffers of its own; small steps before large ones
            by_rows = self._setting.kind != "cpu"  # a card keeps what it captured for many rows
            ordered = sorted(points, key=lambda point: (by_rows * point.rows, point.context + point.tokens, point.rows))
            found = {point: self._worker.call(partial(self._peak, point)) for point in ordered}
        times = {point: self._worker.call(partial(self._time, point, spend_s, peaks)) for point in points}
        return {point: replace(sample, peak_bytes=found.get(point, 0)) for point, sample in times.items()}

    def close(self) -> None:
        """Give the memory back."""
        for stage in self._stages:
            self._worker.call(stage.close)
        self._stages.clear()
        self._worker.close()
        if self._setting.kind != "cpu":
            give_back()  # stages are circles
            release(torch, self._setting.kind)

    def _peak(self, point: Point) -> int:
        """Bytes of one such step; of a chunk with history, of several prompts up to there: what the C library keeps of
        shorter steps does not fit longer ones, and may grow for a few prompts."""
        before = range(0, point.context, point.tokens) if point.tokens > 1 else ()
        runners = [self._runner(replace(point, context=context)) for context in (*before, point.context)]

        def run() -> None:
            until = time.perf_counter() + PROMPTS_SECONDS
            for _ in range(MOST_PROMPTS if before else 1):
                for runner in runners:
                    runner(self._stages[0])
                if time.perf_counter() > until:
                    return

        return peak_of(run, self._setting.kind, self._setting.device, self._held)

    def _time(self, point: Point, spend_s: float, warm: bool) -> Sample:
        """``warm``: the first stage ran such a step already."""
        run = self._runner(point)
        computed = self._setting.kind == "cpu" and point.tokens >= COMPUTED_TOKENS
        stages = self._stages[:COMPUTED_COPIES] if computed else self._stages
        for stage in stages[warm:]:
            run(stage)
        if not self._reads_between:
            return sample(run, stages, spend_s)
        memory = torch.ones(BETWEEN_BYTES // 4)
        return sample(run, stages, spend_s, before=memory.sum)

    def _runner(self, point: Point) -> Callable[[RangeStage], None]:
        """What runs the step of that point on a stage, and waits for it."""
        step = make_step(point, self._structure.groups, self._setting.block_tokens, self._blocks)
        incoming = _activation(self._stages[0], self._structure.hidden, point)

        def run(stage: RangeStage) -> None:
            stage.run(step, incoming)
            self._settle()

        return run


def copies_needed(unit_bytes: int, kind: str, device: str = "cpu", model_bytes: float = inf) -> int:
    """Copies of a unit that together do not fit the last cache of torch's ``device``, as far as the whole model would
    not; nor, however small that is, the inner caches. ``MOST_COPIES`` of them at most."""
    caches = PROCESSOR_CACHES * last_cache_bytes() if kind == "cpu" else CARD_CACHES * card_cache_bytes(kind, device)
    wanted = max(COLD_BYTES, min(caches, model_bytes))
    return max(1, min(MOST_COPIES, ceil(wanted / max(unit_bytes, 1) - MISSING_SHARE)))


def card_cache_bytes(kind: str, device: str) -> int:
    """Size of a card's last cache, 0 where torch does not say."""
    if kind != "cuda" or not torch.cuda.is_available():
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))


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


def _fill(model: CutModel, setting: Setting, made: dict[str, Weight]) -> int:
    skeleton = model.skeleton.model
    source = RepeatedSource({name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}, made)
    loader = Loader(skeleton, source, model.dtype)
    return loader.load(model.own_names, setting.weights, setting.device, keep=source.keep).nbytes


def sample(
    run: Callable[[Any], None], subjects: Sequence[Any], spend_s: float, before: Callable[[], object] | None = None
) -> Sample:
    """The runs' median and spread; ``subjects`` take turns. ``before`` each run, beside the clock."""
    times: list[float] = []
    until = time.perf_counter() + spend_s
    while len(times) < LEAST_RUNS or (time.perf_counter() < until and len(times) < MOST_RUNS):
        if len(times) >= FEWEST_RUNS and time.perf_counter() > until + spend_s:
            break
        subject = subjects[len(times) % len(subjects)]
        if before is not None:
            before()
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
    """For the cache: three numbers per point."""
    flat: dict[str, float] = {}
    for point, found in samples.items():
        flat[point.name] = found.seconds
        flat[f"{point.name} spread"] = found.spread
        flat[f"{point.name} bytes"] = found.peak_bytes
    return flat


def samples_of(kept: Mapping[str, float], points: Sequence[Point]) -> dict[Point, Sample]:
    """The points that the cache has."""
    return {
        point: Sample(kept[point.name], kept.get(f"{point.name} spread", 0.0), int(kept.get(f"{point.name} bytes", 0)))
        for point in points
        if point.name in kept
    }
