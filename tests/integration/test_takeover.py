"""A stage whose node is lost for good is computed by the coordinator, beside all others as they are: the same ids."""

from __future__ import annotations

import os
import signal
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest
from test_processes import PATIENCE, SAMPLED, at_step, demo, process_of, remote_of, run, undisturbed
from test_recovery import IN_FLIGHT, OUTPUTS, PROMPTS

import splitrun
from splitrun.cluster.nodes import NodeLost
from splitrun.engine import lineup
from splitrun.engine.core import EngineCore
from splitrun.engine.remote import RemoteStages
from splitrun.planner.placement import Placement

ONE, TWO = "process/cpu", "process-2/cpu"


class Here:
    """Has room for everything on ``cpu``."""

    def __init__(self, core: EngineCore, placement: Placement) -> None:
        self._core = core
        self._placement = placement

    def take_over(self, devices: Collection[str]) -> bool:
        lost = [index for index, spec in enumerate(self._placement.stages) if spec.device in devices]
        specs = (replace(spec, device="cpu") if spec.device in devices else spec for spec in self._placement.stages)
        self._placement = replace(self._placement, stages=tuple(specs))
        assert self._core._line.take_over is not None
        self._core.show(self._core._line.take_over(self._placement, lost))
        return True

    def replace(self, reason: str, devices: Collection[str]) -> None:
        raise AssertionError(reason)


@pytest.fixture(scope="module")
def expected() -> list[tuple[int, ...]]:
    return undisturbed()["sampled"]


@pytest.fixture(params=["kept", "journals", "nothing"])
def keeping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What there is of a lost stage: its KV; what it was sent; the tokens alone."""
    if request.param != "kept":
        monkeypatch.setattr(lineup, "kept_room", lambda placement, *_: dict.fromkeys(range(len(placement.stages)), 0))
        monkeypatch.setattr(lineup, "journals_fit", lambda *_: request.param == "journals")
    return str(request.param)


def lose_for_good(engine: splitrun.Engine, placement: Placement, monkeypatch: pytest.MonkeyPatch) -> RemoteStages:
    """From now on the node ONE cannot be started on again, and its stages come here."""
    remote, starter = remote_of(engine), remote_of(engine)._starter
    remote._successor = Here(engine.core, placement)

    def gone(device: str, job: Any) -> Any:
        if device == ONE:
            raise NodeLost(f"{device}: its node has left")
        return starter(device, job)

    monkeypatch.setattr(remote, "_starter", gone)
    return remote


LINES = [("cpu", ONE), (ONE, "cpu"), ("cpu", ONE, TWO), (ONE, TWO, "cpu"), ("cpu", ONE, "cpu:1"), (ONE, TWO)]
IN_CI = LINES[2]


@pytest.mark.parametrize(
    "devices",
    [pytest.param(one, marks=() if one == IN_CI else pytest.mark.long, id="-".join(one)) for one in LINES],
)
def test_what_a_lost_node_did_is_computed_here(
    expected: list[tuple[int, ...]], keeping: str, monkeypatch: pytest.MonkeyPatch, devices: tuple[str, ...]
) -> None:
    """While streams decode, and whether the stages before and behind it are here or not."""
    placement = demo(*devices)
    with splitrun.Engine(placement, chunk_tokens=16, patience=PATIENCE) as engine:
        remote = lose_for_good(engine, placement, monkeypatch)
        others = {index: link.stage for index, link in enumerate(engine.core.pipeline.links) if hasattr(link, "stage")}
        children = {device: process_of(engine, device).process_id for device in devices if device == TWO}
        at_step(engine, monkeypatch, 21, lambda: os.kill(process_of(engine, ONE).process_id, signal.SIGKILL))
        assert run(engine, SAMPLED) == expected
        assert [stage.device for stage in engine.core.status().stages] == [
            "cpu" if device == ONE else device for device in devices
        ]
        spans = engine.core.take_spans()
        for index, stage in others.items():
            assert engine.core.pipeline.links[index].stage is stage  # type: ignore[union-attr]
            again = sum(span.tokens for span in spans if span.stage == index) - PROMPTS - OUTPUTS
            assert (again <= IN_FLIGHT) == (keeping != "nothing")
        assert {device: process_of(engine, device).process_id for device in children} == children
        assert run(engine, SAMPLED) == expected
        assert remote._kept.nbytes == 0


@pytest.mark.parametrize("devices", [("cpu", ONE, TWO), pytest.param((ONE, TWO), marks=pytest.mark.long)])
@pytest.mark.parametrize("same", [True, pytest.param(False, marks=pytest.mark.long)], ids=["same", "later"])
def test_the_stage_behind_is_lost_afterwards(
    expected: list[tuple[int, ...]], keeping: str, monkeypatch: pytest.MonkeyPatch, devices: tuple[str, ...], same: bool
) -> None:
    """It comes back, while the requests run that saw the first loss, or later ones. What it was sent is kept by the
    stage that has come here meanwhile."""
    placement = demo(*devices)
    with splitrun.Engine(placement, chunk_tokens=16, patience=PATIENCE) as engine:
        lose_for_good(engine, placement, monkeypatch)

        def kill(device: str) -> None:
            os.kill(process_of(engine, device).process_id, signal.SIGKILL)

        at_step(engine, monkeypatch, 15, lambda: kill(ONE))
        if not same:
            assert run(engine, SAMPLED) == expected
        at_step(engine, monkeypatch, 32 if same else 21, lambda: kill(TWO))
        assert run(engine, SAMPLED) == expected
        assert engine.core.status().stages[-1].restarts == 1
        assert [stage.device for stage in engine.core.status().stages][-2:] == ["cpu", TWO]
        assert run(engine, SAMPLED) == expected


@pytest.mark.long
def test_one_node_after_the_other(expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the end everything is here; the second is lost while the first's KV is put in its place."""
    placement = demo(ONE, "cpu", TWO)
    with splitrun.Engine(placement, chunk_tokens=16, patience=PATIENCE) as engine:
        remote = remote_of(engine)
        remote._successor = Here(engine.core, placement)

        def gone(device: str, job: Any) -> Any:
            raise NodeLost(f"{device}: its node has left")

        monkeypatch.setattr(remote, "_starter", gone)
        begin, losses = remote._restoration.begin, []

        def begin_and_lose(loss: int, held: Any) -> None:
            begin(loss, held)
            losses.append(loss)
            if len(losses) == 1:
                os.kill(process_of(engine, TWO).process_id, signal.SIGKILL)

        monkeypatch.setattr(remote._restoration, "begin", begin_and_lose)
        at_step(engine, monkeypatch, 21, lambda: os.kill(process_of(engine, ONE).process_id, signal.SIGKILL))
        assert run(engine, SAMPLED) == expected
        assert len(losses) == 2
        assert {stage.device for stage in engine.core.status().stages} == {"cpu"}
        assert run(engine, SAMPLED) == expected
