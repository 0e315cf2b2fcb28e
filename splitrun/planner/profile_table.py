"""A model's profile in plain text: bytes and seconds of its distinct units per device and format."""

from __future__ import annotations

from splitrun.planner.facts import Cluster, ModelProfile
from splitrun.planner.kv import looked_back
from splitrun.planner.seconds import UnitSeconds
from splitrun.quantities import format_bytes, format_seconds

NEAR, FAR = 128, 4096


def profile_lines(profile: ModelProfile, cluster: Cluster) -> list[str]:
    """The units with their bytes, then for each device and format the seconds that were measured."""
    kv = max((sum(unit.kv_values_per_token.values()) for unit in profile.units), default=0)
    lines = [
        f"{profile.source} · {profile.model_type} · {profile.layers} layers · stored as {profile.stored_format} · "
        f"{kv:,} KV values per token and layer",
        "",
        *_bytes(profile),
    ]
    for device in cluster.devices:
        formats = [weights for name, weights in profile.seconds if name == device.name]
        if not formats:
            lines += ["", f"{device.name}: nothing was timed; bandwidths decide ({device.description})"]
        for weights in formats:
            lines += ["", f"{device.name}, {weights} ({device.description})", *_seconds(profile, device.name, weights)]
    return lines


def _bytes(profile: ModelProfile) -> list[str]:
    formats = list(profile.units[0].weight_bytes)
    rows: list[tuple[str, ...]] = [("unit", *formats)]
    for name, first in distinct(profile):
        unit = profile.units[first]
        rows.append((name, *(format_bytes(unit.weight_bytes[weights]) for weights in formats)))
    return _aligned(rows)


def _seconds(profile: ModelProfile, device: str, weights: str) -> list[str]:
    measured = profile.seconds[device, weights]
    rows: list[tuple[str, ...]] = [
        ("unit", "1 row", f"at {FAR}", "4 rows", "16 rows", "32 tokens", "512 tokens", "spread")
    ]
    rows.append(("every stage", *_cells(measured.stage)))
    for name, first in distinct(profile):
        near, far = (looked_back(profile.units[first], profile.groups, tokens) for tokens in (NEAR, FAR))
        rows.append((name, *_cells(measured.units[first], near, far)))
    return _aligned(rows)


def _cells(unit: UnitSeconds, near: int = NEAR, far: int = FAR) -> tuple[str, ...]:
    measured = {line.rows for line in unit.decode}
    rows = [format_seconds(unit.decode_s(count, near)) if count in measured else "-" for count in (1, 4, 16)]
    chunks = [format_seconds(unit.prefill_s(tokens)) for tokens in (32, 512)]
    return (rows[0], format_seconds(unit.decode_s(1, far)), *rows[1:], *chunks, f"±{unit.spread:.0%}")


def distinct(profile: ModelProfile) -> list[tuple[str, int]]:
    """(name, number) of the first of each run of equal units: "embed", "layers 0–27", "head"."""
    found: list[tuple[str, int]] = []
    layers = profile.units[1:-1]
    start = 0
    for index in range(1, len(layers) + 1):
        if index == len(layers) or layers[index].weight_bytes != layers[start].weight_bytes:
            name = f"layer {start}" if index - start == 1 else f"layers {start}–{index - 1}"
            found.append((name, start + 1))
            start = index
    return [("embed", 0), *found, ("head", len(profile.units) - 1)]


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
