"""What a real run told about the predictions: factors per model, device and format, kept and put on later ones.

A run compares whole steps with what was foretold from units; the ratio is folded into the factors of every device and
format that took part. Knows nothing of how runs are made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import geometric_mean

from splitrun.measure.cache import Cache
from splitrun.measure.code import COMPUTING, code_digest
from splitrun.measure.versions import versions
from splitrun.planner.facts import FORMATS, Cluster, Device, Factor, ModelProfile
from splitrun.planner.seconds import DeviceSeconds, UnitSeconds

LEAST, MOST = 0.25, 4.0
"""A factor beyond these is a disturbed run and not a residual."""


def factor(kept: Cache, model: str, device: Device, weights: str) -> Factor:
    """The factor that is kept for the model of that fingerprint: 1 where there is none or everything is to be measured
    again. A format that no run told of is taken to be off as those are that the device ran, in the (geometric) mean: or
    what a run told would count against its format alone."""
    if kept.refresh:
        return Factor()
    own = _told(kept, model, device, weights)
    if own is not None:
        return own
    found = [each for name in FORMATS if (each := _told(kept, model, device, name)) is not None]
    if not found:
        return Factor()
    decode, prefill = geometric_mean(each.decode for each in found), geometric_mean(each.prefill for each in found)
    return Factor(decode, prefill, borrowed=True)


def fold(kept: Cache, model: str, places: Sequence[tuple[Device, str]], ratio: Factor) -> list[Factor]:
    """Multiply what was foretold with, for each device and format of a run, with measured over predicted of it; returns
    what is kept from now on. Devices that share a factor learn once."""
    before = {key_of(model, *place): factor(kept, model, *place) for place in places}
    after = {
        key: Factor(_within(each.decode * ratio.decode), _within(each.prefill * ratio.prefill))
        for key, each in before.items()
    }
    for key, new in after.items():
        kept.put(key, {"decode": new.decode, "prefill": new.prefill})
    return [after[key_of(model, *place)] for place in places]


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
                if (by.decode, by.prefill) != (1.0, 1.0):
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
    """Under which the cache has the factor: devices of one description share it, and code that computes otherwise has
    others."""
    kv = f" KV {device.kv_dtype}" if device.kv_dtype else ""
    below = " ".join(versions(device.kind))
    return f"calibration {device.description} {weights}{kv} of {model} by {code_digest(*COMPUTING)} on {below}"


def _told(kept: Cache, model: str, device: Device, weights: str) -> Factor | None:
    """What runs told; None where none did, or all is forgotten."""
    found = kept.get(key_of(model, device, weights)) or {}
    told = Factor(_within(found.get("decode", 1.0)), _within(found.get("prefill", 1.0)))
    return None if told == Factor() else told


def _within(value: float) -> float:
    return min(MOST, max(LEAST, value))
