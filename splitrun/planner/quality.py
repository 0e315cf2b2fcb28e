"""What a weight format costs in precision: additive over weights, so that a plan's loss is a sum over its units.

A weight's loss is its format's relative error: root mean square of what the format changes, over the root mean square
of the weights. Knows nothing of speed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from splitrun.errors import InvalidPlacement
from splitrun.planner.facts import FORMATS, ModelProfile
from splitrun.planner.placement import Placement

RELATIVE_ERROR: Mapping[str, float] = {"fp32": 0.0, "fp16": 0.00021, "bf16": 0.0017, "int8": 0.0081, "nf4": 0.092}
"""Measured on normally distributed weights, rows of 1536: ``splitrun.kernels`` there and back, against float32."""
DEFAULT_LIMIT = "nf4"


def unit_loss(profile: ModelProfile, unit: int, weights: str) -> float:
    """Summed relative error of a unit's quantizable weights in that format; none in the checkpoint's own format."""
    return 0.0 if weights == profile.stored_format else profile.units[unit].quantized_values * RELATIVE_ERROR[weights]


def placement_loss(profile: ModelProfile, placement: Placement) -> float:
    """Summed relative error of the whole plan."""
    stages = placement.stages
    return sum(unit_loss(profile, unit, stage.weights) for stage in stages for unit in stage.units)


def loss_share(profile: ModelProfile, placement: Placement) -> float:
    """The plan's loss as a share of that with everything in NF4; 0 for a model without quantizable weights."""
    most = sum(unit.quantized_values for unit in profile.units) * RELATIVE_ERROR["nf4"]
    return placement_loss(profile, placement) / most if most else 0.0


def most_lost(profile: ModelProfile, formats: Mapping[str, Sequence[str]]) -> float:
    """The most that any plan loses in these formats (of each device)."""
    named = {name for each in formats.values() for name in each}
    return sum(max(unit_loss(profile, unit, name) for name in named) for unit in range(len(profile.units)))


def loss_limit(profile: ModelProfile, quality: str) -> float:
    """The most that a plan may lose: ``share_of`` what it loses with everything in NF4. Raises InvalidPlacement."""
    values = sum(unit.quantized_values for unit in profile.units)
    return values * RELATIVE_ERROR["nf4"] * share_of(quality, profile.stored_format) * (1 + 1e-9)


def check_quality(weights: str, quality: str) -> None:
    """Raise InvalidPlacement for a limit that is none, or beside a format that leaves no choice."""
    if weights != "auto" and quality != DEFAULT_LIMIT:
        raise InvalidPlacement(f"--quality limits --weights auto, and --weights {weights} leaves no choice: give one")
    share_of(quality)


def share_of(quality: str, stored: str = FORMATS[0]) -> float:
    """What a plan may lose, as a share of all-NF4: a format's name for as much as with everything in it, or a number.
    With everything in the format of the checkpoint, ``stored``, or in a more precise one, nothing is lost.

    Raises InvalidPlacement for anything else.
    """
    if quality in FORMATS and FORMATS.index(quality) <= FORMATS.index(stored):
        return 0.0
    if quality in FORMATS:
        return RELATIVE_ERROR[quality] / RELATIVE_ERROR["nf4"]
    try:
        part = float(quality)
    except ValueError:
        part = -1.0
    if not 0 <= part <= 1:
        raise InvalidPlacement(
            f"--quality {quality[:40]} is neither a weight format ({', '.join(FORMATS)}) nor a share of nf4's loss, "
            "0 to 1"
        )
    return part
