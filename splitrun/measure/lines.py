"""From what a stop-watch saw to what the planner counts with: a unit's share of a stage, and lines through figures.

Arithmetic alone; knows neither benches nor devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from splitrun.measure.timing import Sample
from splitrun.measure.unit_steps import Point
from splitrun.planner.peaks import RowsPeak, UnitPeak
from splitrun.planner.seconds import DecodeLine, UnitSeconds, filled

Samples = dict[Point, Sample]
MOST_BESIDE, MOST_BESIDE_CHUNK = 2.0, 6.0
"""A stage of layers prepares a step at most so many times as long as one that only embeds: rotary tables, a mask; and a
chunk of a prompt on a processor, which computes their sines and cosines itself."""


@dataclass(frozen=True)
class Found:
    """What a bench told of a range; ``load_bytes`` are those of loading it, ``fast`` the threads it settled on,
    ``chunk_step`` how its stage fills chunks of a prompt."""

    samples: Samples
    load_bytes: int
    fast: int | None = None
    chunk_step: int = 1


def less(found: Samples, stage: Samples) -> Samples:
    """What is left of a stage's seconds when those that any stage takes are taken off."""
    return {
        point: replace(sample, seconds=max(0.0, sample.seconds - stage[point].seconds))
        for point, sample in found.items()
        if point in stage
    }


def most_beside(embed: Samples, on_processor: bool) -> dict[Point, float]:
    """The most seconds that a stage of layers takes beside them, by those of one that only embeds."""

    def factor(point: Point) -> float:
        return MOST_BESIDE_CHUNK if on_processor and point.tokens > 1 else MOST_BESIDE

    return {point: factor(point) * sample.seconds for point, sample in embed.items()}


def slope(several: Samples, one: Samples, count: int, most: Mapping[Point, float] | None = None) -> Samples:
    """Seconds of one layer: what ``count`` of them in a row take more than one, for each of those more.

    A difference of two figures that were taken moments apart is noisy, so it is held within what must be: no more than
    an equal share of the whole, and no less than that share when a stage takes the ``most`` that it may beside layers.
    """

    def within(point: Point, sample: Sample) -> float:
        beside = most[point] if most else sample.seconds
        least = max(0.0, sample.seconds - beside) / count
        more = max(0.0, sample.seconds - one[point].seconds) / (count - 1)
        return min(max(least, more), sample.seconds / count)

    return {point: replace(sample, seconds=within(point, sample)) for point, sample in several.items()}


def at_most(rest: Samples, most: Mapping[Point, float]) -> Samples:
    """What a stage takes beside its layers, no more than the ``most`` that it may."""
    return {point: replace(sample, seconds=min(sample.seconds, most[point])) for point, sample in rest.items()}


def unit_seconds(samples: dict[Point, Sample], points: Iterable[Point], chunk_step: int = 1) -> UnitSeconds:
    """Lines through what was measured: a + b * context per number of rows, and chunks without and with history."""
    near_and_far: dict[int, list[Point]] = {}
    chunks: list[tuple[int, float]] = []
    behind: list[Point] = []
    for point in points:
        if point.tokens == 1:
            near_and_far.setdefault(point.rows, []).append(point)
        elif point.context == 0:
            chunks.append((int(filled(point.tokens, chunk_step)), samples[point].seconds))
        else:
            behind.append(point)
    lines = []
    for rows, ends in sorted(near_and_far.items()):
        near, far = (samples[point].seconds for point in (ends[0], ends[-1]))
        distance = ends[-1].context - ends[0].context
        slope = max(0.0, (far - near) / distance) if distance else 0.0
        lines.append(DecodeLine(rows, max(0.0, near - slope * ends[0].context), slope))
    history = 0.0
    for point in behind:
        without = dict(chunks).get(int(filled(point.tokens, chunk_step)), samples[point].seconds)
        history = max(0.0, samples[point].seconds - without) / (point.tokens * point.context)
    spreads = sorted(samples[point].spread for point in points if point.tokens == 1)
    return UnitSeconds(tuple(lines), tuple(sorted(chunks)), history, spreads[len(spreads) // 2], chunk_step)


def unit_peak(found: Found, points: Iterable[Point]) -> UnitPeak:
    """Lines through the temporary bytes that were seen, as ``unit_seconds`` through seconds."""
    sizes = {point: float(found.samples[point].peak_bytes) for point in points}
    chunks = [(point.tokens, size) for point, size in sizes.items() if point.tokens > 1 and point.context == 0]
    chunks = sorted(chunks) or [(1, 0.0)]
    histories = [(0, chunks[-1][1])]
    decode: dict[int, list[tuple[int, float]]] = {}
    for point, size in sizes.items():
        if point.tokens == 1:
            decode.setdefault(point.rows, []).append((point.context, size))
        elif point.context:
            histories.append((point.context, max(size, histories[-1][1])))
    lines = []
    for rows, ends in sorted(decode.items()):
        (near, low), (far, high) = min(ends), max(ends)
        more = max(0.0, high - low) / (far - near) if far > near else 0.0
        lines.append(RowsPeak(rows, max(0.0, low - more * near), more))
    return UnitPeak(found.load_bytes, tuple(chunks), tuple(sorted(histories)), tuple(lines))
