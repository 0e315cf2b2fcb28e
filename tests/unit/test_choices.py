"""Equal layers are counted once, and others each for itself."""

from __future__ import annotations

from dataclasses import replace

import numpy
import pytest
from planner_models import device, model

from splitrun.planner.choices import Parts
from splitrun.planner.facts import ModelProfile, Workload
from splitrun.planner.peaks import RowsPeak, UnitPeak
from splitrun.planner.seconds import DecodeLine, DeviceSeconds, UnitSeconds

PLACE = ("cpu", "bf16")


def seconds(value: float) -> UnitSeconds:
    return UnitSeconds((DecodeLine(1, value, 0.0),), ((32, value),))


def measured(profile: ModelProfile, values: list[float]) -> ModelProfile:
    units = tuple(seconds(value) for value in values)
    return replace(profile, seconds={PLACE: DeviceSeconds(seconds(0.0), units)})


def peak(size: int) -> UnitPeak:
    return UnitPeak(size, ((32, 0.0),), ((0, 0.0),), (RowsPeak(1, 0.0, 0.0),))


def test_equal_layers_are_of_one_kind() -> None:
    profile = model(layers=4)
    assert profile.kinds == (0, 1, 1, 1, 1, 5)
    wider = replace(profile.units[3], state_bytes=1)
    again = replace(wider, name="layer 3")
    profile = replace(profile, units=(*profile.units[:3], wider, again, profile.units[5]))
    assert profile.kinds == (0, 1, 1, 3, 3, 5)


def test_an_end_like_a_layer_is_of_its_own_kind() -> None:
    profile = model(layers=2)
    layer = profile.units[1]
    assert replace(profile, units=(layer,) * 4).kinds == (0, 1, 1, 3)


@pytest.mark.parametrize("odd", [1, 3])
def test_a_layer_with_seconds_or_peaks_of_its_own_is_counted_for_itself(odd: int) -> None:
    values = [1.0, 2.0, 2.0, 2.0, 4.0]
    values[odd] = 3.0
    profile = measured(model(layers=3), values)
    profile = replace(profile, peaks={PLACE: tuple(peak(10**9 + unit * (unit == odd)) for unit in range(5))})
    parts = Parts.of(profile, device(), Workload(), "bf16")
    assert list(numpy.diagonal(parts.run_s, 1)) == pytest.approx(values[1:4])
    assert list(numpy.diagonal(parts.workspace_bytes, 1)) == [10**9 + unit * (unit == odd) for unit in (1, 2, 3)]
    assert parts.workspace_bytes[0, 3] == 10**9 + odd
