"""A step that a stage in another process could not finish is told with that process's name."""

from __future__ import annotations

from typing import Any

import pytest

from splitrun.engine.exchange import COORDINATOR
from splitrun.engine.outcome import Failure
from splitrun.engine.patience import Patience
from splitrun.engine.remote import RemoteStages
from splitrun.errors import DeviceOutOfMemory, StageError
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
