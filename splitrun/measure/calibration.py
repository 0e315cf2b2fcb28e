"""What a real run told about the predictions: factors per device and format that are kept and put on later ones.

A run compares whole steps with what was foretold from units; the ratio is folded into the factors of every device and
format that took part. Knows nothing of how runs are made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from splitrun.measure.cache import Cache
from splitrun.planner.facts import Cluster, Device, ModelProfile
from splitrun.planner.seconds import DeviceSeconds, UnitSeconds

LEAST, MOST = 0.25, 4.0
"""A factor beyond these is a disturbed run and not a residual."""
WORTH_NAMING = 0.005


@dataclass(frozen=True)
class Factor:
    """What measured seconds of units are multiplied with: decoded tokens, and prompts."""

    decode: float = 1.0
    prefill: float = 1.0


def factor(kept: Cache, device: Device, weights: str) -> Factor:
    """The factor that is kept, 1 where there is none or everything is to be measured again."""
    found = {} if kept.refresh else kept.get(_key(device, weights)) or {}
    return Factor(found.get("decode", 1.0), found.get("prefill", 1.0))


def fold(kept: Cache, device: Device, weights: str, ratio: Factor) -> Factor:
    """Multiply what is kept with measured over predicted of a run; returns what is kept from now on."""
    before = factor(kept, device, weights)
    new = Factor(_within(before.decode * ratio.decode), _within(before.prefill * ratio.prefill))
    kept.put(_key(device, weights), {"decode": new.decode, "prefill": new.prefill})
    return new


def forget(kept: Cache, devices: Iterable[Device], formats: Iterable[str]) -> None:
    """Keep no factor for these from now on."""
    formats = tuple(formats)
    for device in devices:
        for weights in formats:
            if kept.get(_key(device, weights)) is not None:
                kept.put(_key(device, weights), {"decode": 1.0, "prefill": 1.0})


def calibrated(profile: ModelProfile, cluster: Cluster, kept: Cache) -> ModelProfile:
    """The profile with its seconds multiplied by what is kept."""
    seconds = dict(profile.seconds)
    for device in cluster.devices:
        for name, weights in profile.seconds:
            if name == device.name:
                seconds[name, weights] = _scaled(profile.seconds[name, weights], factor(kept, device, weights))
    return replace(profile, seconds=seconds)


def notes(cluster: Cluster, kept: Cache, used: Iterable[tuple[str, str]]) -> list[str]:
    """A sentence for each (device, format) in use whose seconds are multiplied."""
    sentences = []
    for name, weights in sorted(set(used)):
        found = factor(kept, cluster.device(name), weights)
        if max(abs(found.decode - 1), abs(found.prefill - 1)) > WORTH_NAMING:
            sentences.append(
                f"calibrated by a run: {weights} on {name} takes {found.decode:.2f} times its units' seconds decoding, "
                f"{found.prefill:.2f} times for prompts (--no-cache forgets that)"
            )
    return sentences


def _scaled(found: DeviceSeconds, by: Factor) -> DeviceSeconds:
    return DeviceSeconds(_unit(found.stage, by), tuple(_unit(unit, by) for unit in found.units))


def _unit(unit: UnitSeconds, by: Factor) -> UnitSeconds:
    lines = tuple(
        replace(line, fixed_s=line.fixed_s * by.decode, per_token_s=line.per_token_s * by.decode)
        for line in unit.decode
    )
    prefill = tuple((tokens, seconds * by.prefill) for tokens, seconds in unit.prefill)
    return replace(unit, decode=lines, prefill=prefill, chunk_history_s=unit.chunk_history_s * by.prefill)


def _key(device: Device, weights: str) -> str:
    return f"calibration {device.kind} {device.description} {weights}"


def _within(value: float) -> float:
    return min(MOST, max(LEAST, value))
