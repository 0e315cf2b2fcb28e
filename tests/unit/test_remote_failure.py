"""What the coordinator makes of frames from stages in other processes, where no process is needed to see it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch

from splitrun.engine.exchange import COORDINATOR
from splitrun.engine.outcome import Failure
from splitrun.engine.patience import Patience
from splitrun.engine.remote import RemoteStages
from splitrun.engine.signs import Signs
from splitrun.errors import DeviceOutOfMemory, StageError, StageLost
from splitrun.schedule.flat import MalformedMessage
from splitrun.transport.frames import Frame, Kind


def nobody(device: str, job: object) -> Any:
    raise AssertionError("nothing is started here")


@pytest.mark.parametrize(("kind", "error"), [("DeviceOutOfMemory", DeviceOutOfMemory), ("ValueError", StageError)])
def test_a_failing_step_names_its_process(kind: str, error: type[StageError]) -> None:
    remote = RemoteStages(("process-2/cpu", COORDINATOR), {"process-2/cpu": {}}, nobody, Patience())
    told: list[Any] = []
    remote._deliver = told.append
    control = {"kind": kind, "message": "stage layers 0–3 on cpu ran out of memory"}
    remote._receive(Frame(Kind.FAILURE, remote._exchange.route.session, step=3, control=control))
    remote.close()
    [failure] = told
    assert isinstance(failure, Failure)
    assert (type(failure.error), failure.step) == (error, 3)
    assert str(failure.error) == "process-2/cpu: stage layers 0–3 on cpu ran out of memory"


LIFE = [
    (Frame(Kind.BEAT, 0, 1, control={"busy": False}), "process/cpu"),
    (Frame(Kind.KV, 0, 1, control={"request": 1, "start": 0, "slot": 0, "tables": {}}, body=torch.zeros(1, 2)),
     "process/cpu"),
    (Frame(Kind.RESTORED, 0, 1), "process/cpu"),
    (Frame(Kind.STEP, 0, 2), "process/cpu"),
    (Frame(Kind.TOKENS, 0, 3, integers=[0]), "process-2/cpu"),
]  # fmt: skip


@pytest.mark.parametrize(("frame", "sender"), LIFE, ids=lambda value: getattr(getattr(value, "kind", None), "name", ""))
def test_whatever_comes_is_a_sign_of_life(frame: Frame, sender: str) -> None:
    """Of its sender: a step comes from the stage before the one that it is for."""
    peers = (COORDINATOR, "process/cpu", COORDINATOR, "process-2/cpu")
    remote = RemoteStages(peers, {"process/cpu": {}, "process-2/cpu": {}}, nobody, Patience())
    remote._signs.silence_s = {"process/cpu": 1.5, "process-2/cpu": 1.5}
    with suppress(MalformedMessage):
        remote._receive(replace(frame, session=remote._exchange.route.session))
    remote.close()
    other = {"process/cpu": "process-2/cpu", "process-2/cpu": "process/cpu"}[sender]
    assert remote._signs.silence_s == {sender: 0.0, other: 1.5}


@pytest.mark.parametrize(
    ("end", "told"), [("was ended by signal 9", "process/cpu was ended by signal 9"), ("", "does the firewall here")]
)
def test_a_process_that_is_never_heard_is_told(end: str, told: str) -> None:
    signs = Signs((COORDINATOR, "process/cpu"), ["process/cpu"])
    signs.heard("process/cpu")
    signs.await_first("process/cpu", 0.0, lambda: end)
    signs.listen_for(["process/cpu"])
    with pytest.raises(StageLost, match=told):
        signs.await_first("process/cpu", 0.0, lambda: end)
