"""Stages put in a row: what each is told of the one behind it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from splitrun.engine.loading import LoadedStages, Ring, make_links
from splitrun.planner.facts import Workload
from splitrun.planner.placement import ModelRef, Placement, StageSpec
from splitrun.transport.local import Worker

EVENT: Any = object()
"""Behind what a stage has left in pinned memory."""


@pytest.mark.parametrize(
    ("behind", "depth", "most_left", "gives"),
    [("cpu", 3, 8, True), ("cpu", 9, 8, False), ("cpu", 3, 0, False), ("cuda:1", 3, 8, False)],
)
def test_a_stage_leaves_rows_to_the_processor_only_where_that_comes_next(
    behind: str, depth: int, most_left: int, gives: bool
) -> None:
    stages: dict[int, Any] = {
        index: SimpleNamespace(reads_host=False, most_left=most_left, gives_host=True, left=lambda: EVENT)
        for index in range(2)
    }
    placement = Placement(
        1,
        ModelRef("m", layers=2),
        Workload(context=64),
        (StageSpec("cuda:0", True, (0, 1), False, "bf16"), StageSpec(behind, False, (1, 2), True, "bf16")),
    )
    workers = {"cuda:0": Worker("cpu"), behind: Worker("cpu")}
    try:
        links = make_links(placement, LoadedStages(stages, workers), None, Ring(depth, 4, 8))
        assert (stages[0].gives_host, stages[1].gives_host) == (gives, False)
        if gives:
            assert links[0].onward is not None
            assert links[0].onward.send(torch.zeros(1, 8)).ready is EVENT
    finally:
        for worker in workers.values():
            worker.close()
