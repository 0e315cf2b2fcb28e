"""The picture of a plan: labels that lie on nothing else, inside the edges."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest
from planner_models import device, model

from splitrun.errors import InvalidPlacement
from splitrun.planner.cost import estimate
from splitrun.planner.facts import Cluster, Workload
from splitrun.planner.picture import MARGIN, WIDTH, draw
from splitrun.planner.placement import ModelRef, Placement, StageSpec

LAYERS = 28
LETTER = 0.52
"""The width of a letter as a share of its size, on average."""


def plan(*starts: int, source: str = "m") -> Placement:
    """A stage on a device of its own from each of these layers on."""
    names = ["cpu", *(f"desktop-upstairs/cuda:{number}" for number in range(len(starts) - 1))]
    stages = tuple(
        StageSpec(name, start == 0, (start, stop), stop == LAYERS, "nf4")
        for name, start, stop in zip(names, starts, (*starts[1:], LAYERS), strict=True)
    )
    placement = Placement(1, ModelRef(source, layers=LAYERS), Workload(), stages)
    return replace(placement, estimate=estimate(model(layers=LAYERS), Cluster(tuple(map(device, names))), placement))


@pytest.mark.parametrize(
    "placement",
    [plan(0), plan(0, 27), plan(0, 6, 12, 18, 24), plan(*range(8)), plan(0, 25, 26, 27),
     plan(0, source="an-organisation/" + "a-very-long-name-" * 6)],
    ids=["one", "two", "five", "eight at the start", "four at the end", "a long name"],
)  # fmt: skip
def test_no_text_is_cut_off_or_lies_on_another(placement: Placement) -> None:
    root = ElementTree.fromstring(draw(placement))
    height, rows = float(root.attrib["height"]), dict[float, list[tuple[float, float]]]()
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        left, top, size = (float(text.attrib[name]) for name in ("x", "y", "font-size"))
        assert text.text
        right = left + LETTER * size * len(text.text)
        assert MARGIN <= left < right <= WIDTH, text.text
        assert top < height
        rows.setdefault(top, []).append((left, right))
    assert len(rows) >= 4  # title, figures, a stage, a device
    for spans in rows.values():
        for (_, right), (left, _) in zip(sorted(spans), sorted(spans)[1:], strict=False):
            assert right <= left


def test_a_plan_without_an_estimate_cannot_be_drawn() -> None:
    with pytest.raises(InvalidPlacement, match="no estimate to draw"):
        draw(replace(plan(0), estimate=None))
