"""Which weight formats a plan may use: those a model can be loaded in, and of them those that suit each device.

Knows no seconds and no bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

from splitrun.errors import InvalidPlacement
from splitrun.planner.facts import FORMATS, VALUE_BYTES, Cluster, Device, ModelProfile

QUANTIZED = ("int8", "nf4")


def device_formats(profile: ModelProfile, cluster: Cluster, weights: str = "auto") -> Mapping[str, tuple[str, ...]]:
    """Device -> the formats to consider there.

    Under "auto" a 16-bit type is considered where the checkpoint is stored in it or the device computes in it: another
    one costs the same and is emulated.
    """
    allowed = allowed_formats(profile, weights)

    def suits(name: str, device: Device) -> bool:
        sixteen_bits = VALUE_BYTES.get(name) == 2
        return not sixteen_bits or weights != "auto" or name in (profile.stored_format, device.compute_dtype)

    return {
        device.name: tuple(name for name in allowed if name in device.formats and suits(name, device))
        for device in cluster.devices
    }


def allowed_formats(profile: ModelProfile, weights: str = "auto") -> tuple[str, ...]:
    """The formats to try, most precise first.

    Under "auto" none is more precise than the checkpoint's own; a checkpoint that is quantized stays as it is.
    Raises InvalidPlacement for a format that the model cannot be loaded in.
    """
    stored = profile.stored_format
    known = tuple(name for name in FORMATS if all(name in unit.weight_bytes for unit in profile.units))
    possible = tuple(name for name in known if name == stored) if stored in QUANTIZED else known
    if weights == "auto":
        choices = tuple(name for name in possible if FORMATS.index(name) >= FORMATS.index(stored))
    else:
        choices = tuple(name for name in possible if name == weights)
    if choices:
        return choices
    allowed = ", ".join(possible)
    if weights != "auto" and weights not in FORMATS:
        raise InvalidPlacement(f"weights {weights!r} is not a format; use --weights auto, or one of {allowed}")
    raise InvalidPlacement(
        f"{profile.source} is stored as {stored} and cannot be loaded as {weights}; use --weights with {allowed}"
    )
