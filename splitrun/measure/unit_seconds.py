"""Measured seconds and temporary bytes of every unit of a model on its devices: each shape once, kept between runs.

Joins the stop-watch (``timing.py``), the cache and the planner's facts. What could not be measured (a format that a
device does not compute, a unit that does not fit) is left out, and the planner falls back to bandwidths there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import splitrun
from splitrun.errors import SplitrunError
from splitrun.kernels.gpu.library import or_compiler_errors
from splitrun.measure.cache import Cache
from splitrun.measure.code import COMPUTING, code_digest
from splitrun.measure.host import worker_threads
from splitrun.measure.lines import Found, Samples, at_most, less, most_beside, slope, unit_peak, unit_seconds
from splitrun.measure.resident import only_new_objects
from splitrun.measure.timing import BETWEEN_BYTES, MOST_COPIES, Setting, UnitBench, copies_needed, figures, samples_of
from splitrun.measure.unit_steps import Point
from splitrun.measure.versions import versions
from splitrun.model.cut import CutRange
from splitrun.model.files import ModelFiles
from splitrun.model.structure import ModelStructure
from splitrun.planner.facts import VALUE_BYTES, Cluster, Device, ModelProfile
from splitrun.planner.peaks import UnitPeak
from splitrun.planner.seconds import FEWEST_DOUBLED, DeviceSeconds
from splitrun.transport.local import torch_device

ROWS = (1, 4, 16)
NEAR, FAR = 128, 4096
CHUNKS = (32, 64, 128, 512)
CHUNK_HISTORIES = (1024, 3584)
MANY_THREADS = 8
"""From so many on, waking them for a chunk of a prompt takes a good part of what one layer does."""
SHARE_OF_MEMORY = 4
"""A unit is timed only where all its copies and its largest step take less than one part in so many of the device."""

Report = Callable[[str], None]
OpenBench = Callable[[Any, ModelStructure, CutRange, Setting, Sequence[Point]], UnitBench]
LOAD, FAST, STEP = "load bytes", "decoding threads", "chunk step"


@dataclass(frozen=True)
class Wanted:
    """What to measure: weight formats per device, and how many rows decode together. ``threads`` are those of
    processors that are to have so many, whatever they would have otherwise."""

    formats: Mapping[str, Sequence[str]]
    rows: tuple[int, ...] = ROWS
    block_tokens: int = 64
    threads: Mapping[str, int] = field(default_factory=dict)


def measure(
    files: ModelFiles,
    structure: ModelStructure,
    profile: ModelProfile,
    cluster: Cluster,
    wanted: Wanted,
    kept: Cache,
    report: Report = lambda text: None,
    open_bench: OpenBench = UnitBench,
) -> ModelProfile:
    """``profile`` with the seconds of its units on every device of the cluster in the formats that it computes.

    ``report`` is told what is being measured, which takes seconds the first time and nothing from the cache.
    ``open_bench`` makes the benches that units are timed on.
    """
    seconds, peaks = dict(profile.seconds), dict(profile.peaks)
    hosts = sum(device.kind == "cpu" for device in cluster.devices)
    for device in cluster.devices:
        given = wanted.threads.get(device.name)
        threads = given or worker_threads(hosts) if device.kind == "cpu" else None
        alone = hosts == 1 and given is None
        for weights in (name for name in wanted.formats.get(device.name, ()) if name in device.formats):
            task = _Task(files, structure, profile, device, weights, threads, alone, wanted, kept, report, open_bench)
            found = task.measured()
            if found is not None:
                seconds[device.name, weights], peaks[device.name, weights] = found
    known = {key: found for key, found in peaks.items() if any(peak.load_bytes for peak in found)}
    return replace(profile, seconds=seconds, peaks=known)


@dataclass(frozen=True)
class _Task:
    """One device and one format."""

    files: ModelFiles
    structure: ModelStructure
    profile: ModelProfile
    device: Device
    weights: str
    threads: int | None
    alone: bool
    wanted: Wanted
    kept: Cache
    report: Report
    open_bench: OpenBench

    def measured(self) -> tuple[DeviceSeconds, tuple[UnitPeak, ...]] | None:
        """The units' seconds and temporary bytes, None when any shape cannot be measured here."""
        layers, points = self.structure.layers, self.points()
        windows = dict.fromkeys([None, *map(self._window, range(layers))])
        every = list(dict.fromkeys(point for window in windows for point in self.points(window)))
        embed = self._found(CutRange(True, 0, 0, False), every)
        if embed is None:
            return None
        most = most_beside(embed.samples, self.device.kind == "cpu")
        fast: int | None = None
        stage: Samples | None = None
        alone: dict[str, tuple[Found, int, Found, list[Point]]] = {}
        for index in range(layers):
            shape = layer_shape(self.structure, index)
            if shape in alone:
                continue
            count, own = self._run_length(index, shape), self.points(self._window(index))
            together = in_a_row(own, count, self.device.kind, self.threads)
            several = self._found(CutRange(False, index, index + count, False), together, fast)
            if several is None:
                return None
            fast = several.fast
            one = self._found(CutRange(False, index, index + 1, False), own, fast) if count > 1 else several
            if one is None:
                return None
            alone[shape] = (several, count, one, own)
            if stage is None and count > 1:
                rest = at_most(less(one.samples, slope(several.samples, one.samples, count, most)), most)
                stage = embed.samples | for_every_step(rest, every)
        last = head_points(points)
        head = self._found(CutRange(False, layers, layers, True), last, fast)
        if head is None:
            return None
        stage = stage or embed.samples
        shapes, peaks, step = {}, {}, embed.chunk_step
        for shape, (several, count, one, own) in alone.items():
            each = less(one.samples, stage)
            if count > 1:
                each |= slope(several.samples, one.samples, count, most)
            shapes[shape], peaks[shape] = unit_seconds(each, own, one.chunk_step), unit_peak(one, own)
            step = one.chunk_step
        order = [layer_shape(self.structure, index) for index in range(layers)]
        first = replace(unit_seconds(less(embed.samples, stage), points, embed.chunk_step), spread=0.0)
        units = (*(shapes[each] for each in order), unit_seconds(less(head.samples, stage), last, head.chunk_step))
        seconds = DeviceSeconds(unit_seconds(stage, points, step), (first, *units))
        return seconds, (unit_peak(embed, points), *(peaks[shape] for shape in order), unit_peak(head, last))

    def _window(self, index: int) -> int | None:
        """How many tokens a layer looks back on at most; None: on all."""
        group = self.structure.caches[index].group
        return None if group is None else group.window

    def points(self, window: int | None = None) -> list[Point]:
        """The steps to time: decoding near and far, prompt chunks with and without history; none further than the
        ``window`` of a layer that looks back on no more."""
        longest = self.profile.max_context - 1
        far = min(FAR, longest, window or FAR)
        near = min(NEAR, max(1, far // 4))
        decode = [Point(rows, 1, context) for rows in self.wanted.rows for context in (near, self._far(rows, far))]
        chunks = sorted({min(tokens, longest) for tokens in CHUNKS})
        prefill = [Point(1, tokens, 0) for tokens in chunks]
        histories = sorted({min(most, longest - chunks[-1], window or most) for most in CHUNK_HISTORIES} - {0})
        return [*decode, *prefill, *(Point(1, chunks[-1], history) for history in histories)]

    def _far(self, rows: int, far: int) -> int:
        """The far context, shortened until the gathered history of all rows takes a small part of the device."""
        values = max((sum(unit.kv_values_per_token.values()) for unit in self.profile.units), default=0)
        room = self.device.budget_bytes // (4 * SHARE_OF_MEMORY)
        while rows * far * values * 4 > room and far > 2 * NEAR:
            far //= 2
        return far

    def _run_length(self, index: int, shape: str) -> int:
        """How many layers of one shape, one after the other from ``index``, are timed at once: enough that they do not
        fit the last cache, so that each is read from memory as in decoding."""
        most, stop = self._copies(self.profile.units[index + 1].weight_bytes[self.weights]), index + 1
        while stop - index < most and stop < self.structure.layers and layer_shape(self.structure, stop) == shape:
            stop += 1
        return stop - index

    def _room(self, size: int) -> int:
        """How often weights of that size may be held at most."""
        return min(self.device.budget_bytes // (SHARE_OF_MEMORY * max(size, 1)), MOST_COPIES)

    def _copies(self, size: int) -> int:
        """How often weights of that size are held, at most, to find them in memory and not in a cache."""
        whole = sum(unit.weight_bytes[self.weights] for unit in self.profile.units[1:])
        needed = copies_needed(size, self.device.kind, torch_device(self.device.name), whole)
        return max(1, min(needed, self._room(size)))

    def _found(self, cut: CutRange, points: Sequence[Point], fast: int | None = None) -> Found | None:
        """What was seen of a range, now or before. ``fast``: the threads that other units settled on."""
        units = cut.units(self.structure.layers)
        key = self._key(cut, units)
        kept = {} if self.kept.refresh else self.kept.get(key) or {}
        known = samples_of(kept, points)
        load_bytes, step = int(kept.get(LOAD, 0)), int(kept.get(STEP, 1))
        fast = int(kept.get(FAST, 0)) or fast
        missing = [point for point in points if point not in known]
        if missing:
            self.report(f"measuring {_range_text(cut)} in {self.weights} on {self.device.name}")
            found = self._measure(cut, units, missing, fast)
            if found is None:
                return None
            known, load_bytes, fast = known | found.samples, max(load_bytes, found.load_bytes), found.fast
            step = found.chunk_step
            self.kept.put(key, {**kept, **figures(known), LOAD: load_bytes, FAST: fast or 0, STEP: step})
        return Found(known, load_bytes, fast, step)

    def _size(self, units: Sequence[int]) -> int:
        return sum(self.profile.units[unit].weight_bytes[self.weights] for unit in units)

    def _measure(self, cut: CutRange, units: Sequence[int], points: Sequence[Point], fast: int | None) -> Found | None:
        size = self._size(units)
        if size * 2 > self.device.budget_bytes:
            return None
        dtype = self._dense_format()
        # Looking up a few rows takes the same in every format, and a dense table is made at once.
        weights = dtype if cut.embed and dtype in self.profile.units[0].weight_bytes else self.weights
        kind, name, blocks = self.device.kind, torch_device(self.device.name), self.wanted.block_tokens
        copies = 1 if cut.embed else self._copies(size)
        settles = self.alone and not cut.embed
        kv = self.device.kv_dtype
        setting = Setting(kind, name, dtype, weights, blocks, self.threads, copies, settles, fast, kv)
        try:
            with only_new_objects():  # here, because looking for them takes a tenth of a second
                bench = self.open_bench(self.files.config, self.structure, cut, setting, points)
                try:
                    return Found(bench.time(points), bench.load_bytes, bench.fast, bench.chunk_step)
                finally:
                    bench.close()
        except or_compiler_errors(SplitrunError, RuntimeError, MemoryError, ValueError):
            return None  # a card without this format, or without room: bandwidths decide

    def _dense_format(self) -> str:
        return self.weights if self.weights in VALUE_BYTES else self.device.compute_dtype

    def _key(self, cut: CutRange, units: Sequence[int]) -> str:
        """Everything that the seconds depend on."""
        shapes = [unit_shape(self.structure, unit) for unit in units]
        conditions = {
            "device": [self.device.kind, self.device.description, self.threads, self.device.compute_dtype],
            "runtime": [torch.version.cuda, splitrun.__version__, *versions(self.device.kind)],
            "code": [code_digest(*COMPUTING), FEWEST_DOUBLED],
            "config": _config_text(self.files.config),
            "units": shapes,
            "ends": [cut.embed, cut.head],
            "between": BETWEEN_BYTES if cut.start == cut.stop else 0,
            "weights": self._dense_format() if cut.embed else self.weights,
            "blocks": self.wanted.block_tokens,
            "kv": self.device.kv_dtype,
            "copies": 1 if cut.embed else self._copies(self._size(units)),
        }
        text = json.dumps(conditions, sort_keys=True, default=str)
        return f"unit {_range_text(cut)} {conditions['weights']} {hashlib.sha256(text.encode()).hexdigest()[:24]}"


def in_a_row(points: Sequence[Point], count: int, kind: str, threads: int | None) -> list[Point]:
    """What is timed on ``count`` layers in a row, beside all points on one. Of prompts on a processor of few cores the
    shortest chunk, which tells what a stage takes for any, and on none a history: both take so much longer themselves.
    """
    if count == 1 or kind != "cpu":
        return list(points)
    many = (threads or 1) >= MANY_THREADS
    shortest = min((point.tokens for point in points if point.tokens > 1), default=1)
    return [point for point in points if point.tokens in (1, shortest) or (many and not point.context)]


def head_points(points: Sequence[Point]) -> list[Point]:
    """What is timed of a head, which computes the last token of a chunk, whatever lies before: of chunks the shortest
    and the longest."""
    chunks = [point for point in points if point.tokens > 1 and not point.context]
    return [point for point in points if point.tokens == 1 or point in (*chunks[:1], *chunks[-1:])]


def for_every_step(rest: Samples, points: Sequence[Point]) -> Samples:
    """What a stage takes beside its layers, ``rest``, for steps that were not timed in a row too: for a chunk of a
    prompt as for the longest that was, for decoding as for the furthest with so many rows."""
    longest = max(rest, key=lambda point: (not point.context, point.tokens))
    furthest = {point.rows: point for point in sorted(rest, key=lambda point: point.context) if point.tokens == 1}
    for point in points:
        if point.tokens > 1 or point.rows in furthest:
            rest = {point: rest[longest if point.tokens > 1 else furthest[point.rows]]} | rest
    return rest


def unit_shape(structure: ModelStructure, unit: int) -> str:
    """Parameters of a unit by name within it, and what it keeps: equal for units that take equal time."""
    if 0 < unit <= structure.layers:
        return layer_shape(structure, unit - 1)
    own = [(info.name, info.shape, info.covered) for info in structure.parameters if info.unit == unit]
    return repr(sorted(own))


def layer_shape(structure: ModelStructure, index: int) -> str:
    """As ``unit_shape`` for a layer, whatever its number."""
    own = [info for info in structure.parameters if info.unit == index + 1]
    names = [(info.name.replace(f".{index}.", ".", 1), info.shape, info.covered) for info in own]
    return repr((sorted(names), structure.caches[index], structure.returns[index]))


def _config_text(config: Any) -> str:
    """The config without what does not change a unit's time."""
    fields = config.to_dict()
    for name in ("num_hidden_layers", "_name_or_path", "name_or_path", "transformers_version", "layer_types"):
        fields.pop(name, None)
    return json.dumps(fields, sort_keys=True, default=str)


def _range_text(cut: CutRange) -> str:
    layers = f"layer {cut.start}" if cut.stop - cut.start == 1 else f"layers {cut.start}–{cut.stop - 1}"
    return "embed" if cut.embed else "head" if cut.head else layers
