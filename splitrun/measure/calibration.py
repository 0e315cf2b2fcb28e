"""What a real run told about the predictions: factors per model, device and format, kept and put on later ones.

A run compares whole steps with what was foretold from units; the ratio is folded into the factors of every device and
format that took part. Knows nothing of how runs are made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from splitrun.measure.cache import Cache
from splitrun.planner.facts import Cluster, Device, Factor, ModelProfile
from splitrun.planner.seconds import DeviceSeconds, UnitSeconds

LEAST, MOST = 0.25, 4.0
"""A factor beyond these is a disturbed run and not a residual."""


def factor(kept: Cache, model: str, device: Device, weights: str) -> Factor:
    """The factor that is kept for the model of that fingerprint, 1 where there is none or everything is to be measured
    again."""
    found = {} if kept.refresh else kept.get(key_of(model, device, weights)) or {}
    return Factor(found.get("decode", 1.0), found.get("prefill", 1.0))


def fold(kept: Cache, model: str, device: Device, weights: str, ratio: Factor) -> Factor:
    """Multiply what is kept with measured over predicted of a run; returns what is kept from now on."""
    before = factor(kept, model, device, weights)
    new = Factor(_within(before.decode * ratio.decode), _within(before.prefill * ratio.prefill))
    kept.put(key_of(model, device, weights), {"decode": new.decode, "prefill": new.prefill})
    return new


def forget(kept: Cache, model: str, devices: Iterable[Device], formats: Iterable[str]) -> None:
    """Keep no factor for these from now on."""
    formats = tuple(formats)
    for device in devices:
        for weights in formats:
            if kept.get(key_of(model, device, weights)) is not None:
                kept.put(key_of(model, device, weights), {"decode": 1.0, "prefill": 1.0})


def calibrated(profile: ModelProfile, cluster: Cluster, kept: Cache) -> ModelProfile:
    """The profile with its seconds multiplied by what is kept, which its ``factors`` tell."""
    seconds, factors = dict(profile.seconds), {}
    for device in cluster.devices:
        for name, weights in profile.seconds:
            if name == device.name:
                by = factor(kept, profile.fingerprint, device, weights)
                if by != Factor():
                    seconds[name, weights] = _scaled(profile.seconds[name, weights], by)
                    factors[name, weights] = by
    return replace(profile, seconds=seconds, factors=factors)


def _scaled(found: DeviceSeconds, by: Factor) -> DeviceSeconds:
    return DeviceSeconds(_unit(found.stage, by), tuple(_unit(unit, by) for unit in found.units))


def _unit(unit: UnitSeconds, by: Factor) -> UnitSeconds:
    lines = tuple(
        replace(line, fixed_s=line.fixed_s * by.decode, per_token_s=line.per_token_s * by.decode)
        for line in unit.decode
    )
    prefill = tuple((tokens, seconds * by.prefill) for tokens, seconds in unit.prefill)
    return replace(unit, decode=lines, prefill=prefill, chunk_history_s=unit.chunk_history_s * by.prefill)


def key_of(model: str, device: Device, weights: str) -> str:
    """Under which the cache has the factor: devices of one description share it."""
    return f"calibration {device.kind} {device.description} {weights} of {model}"


def _within(value: float) -> float:
    return min(MOST, max(LEAST, value))
