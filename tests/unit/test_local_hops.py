"""The hop from a card to the processor: what happens while its copy is under way."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from splitrun.kernels.cpu.library import keep_awake
from splitrun.transport.local import FEW_ROWS, DeviceToHost, Parcel, PinnedRing


class Copy:
    """A copy that is done when it has been asked for some times."""

    def __init__(self, asked: int) -> None:
        self.left = asked
        self.waited = False

    def query(self) -> bool:
        self.left -= 1
        return self.left < 0

    def synchronize(self) -> None:
        self.waited = True


@pytest.mark.parametrize(("rows", "calls"), [(1, 3), (FEW_ROWS, 3), (FEW_ROWS + 1, 0)])
def test_the_processors_threads_are_kept_awake_while_a_card_decodes(rows: int, calls: int) -> None:
    called: list[int] = []
    copy = Copy(3)
    hop = DeviceToHost(PinnedRing(1, 32, 4, torch.float32), lambda: called.append(1))
    tensor = torch.ones(rows, 4)
    assert hop.receive(Parcel(tensor, cast(Any, copy))) is tensor
    assert len(called) == calls
    assert copy.waited


def test_waiting_needs_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_awake()
    monkeypatch.setattr("splitrun.kernels.cpu.library.native", lambda: None)
    keep_awake()
