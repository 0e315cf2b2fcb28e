"""The memory of packed weights: alignment, sharing of regions, and their end."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

from splitrun.kernels.cpu import regions
from splitrun.kernels.cpu.arena import ALIGNMENT, HUGE_PAGE_BYTES, REGION_BYTES, SMALL_BYTES, Arena


def test_pieces_of_one_region_lie_side_by_side() -> None:
    arena = Arena()
    pieces = [arena.empty(SMALL_BYTES + 1, torch.uint8), arena.empty(SMALL_BYTES, torch.float32)]
    addresses = [piece.data_ptr() for piece in pieces]
    assert addresses[0] % HUGE_PAGE_BYTES == 0
    assert addresses[1] - addresses[0] == SMALL_BYTES + ALIGNMENT
    for value, piece in enumerate(pieces):
        piece.fill_(value)
    assert (pieces[0] == 0).all()
    assert (pieces[1] == 1).all()


@pytest.mark.parametrize("count", [REGION_BYTES, REGION_BYTES * 3 + 5])
def test_pieces_larger_than_a_region(count: int) -> None:
    arena = Arena()
    first, second = arena.empty(count, torch.uint8), arena.empty(count, torch.uint8)
    assert first.numel() == second.numel() == count
    first[-1], second[0] = 1, 2
    assert (int(first[-1]), int(second[0])) == (1, 2)


def test_small_pieces_take_no_huge_page() -> None:
    assert Arena().empty(10, torch.float32).data_ptr() % 16 == 0


def test_a_region_ends_with_its_last_tensor() -> None:
    arena = Arena()
    first = arena.empty(SMALL_BYTES, torch.uint8)
    second = arena.empty(SMALL_BYTES, torch.uint8)
    assert arena._region is not None
    region: weakref.ref[object] = arena._region
    del first
    gc.collect()
    assert region() is not None
    second.fill_(3)
    del second
    gc.collect()
    assert region() is None
    assert arena.empty(SMALL_BYTES, torch.uint8).fill_(1).all()


def test_reserved_pieces_share_a_region_and_leave_nothing_behind() -> None:
    arena = Arena()
    with arena.reserved(REGION_BYTES * 2):
        pieces = [arena.empty(REGION_BYTES // 2, torch.uint8).fill_(index) for index in range(3)]
        assert arena._region is not None
        region = arena._region()
        assert region is not None
        inside = memoryview(region)
        inside[-1] = 7
    assert {piece.data_ptr() - pieces[0].data_ptr() for piece in pieces} == {
        0, REGION_BYTES // 2, REGION_BYTES
    }  # fmt: skip
    assert [int(piece[-1]) for piece in pieces] == [0, 1, 2]
    assert inside[-1] == 0  # given back
    assert arena.empty(SMALL_BYTES, torch.uint8).fill_(4).all()


def test_a_region_fetched_ahead_is_taken_once_and_counts_until_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "_ahead", regions._Ahead())
    monkeypatch.setattr(regions, "LEFT_BYTES", REGION_BYTES)
    regions.fetch_ahead(REGION_BYTES * 2)
    ahead = regions._ahead.region
    assert ahead is not None
    for thread in [each for each in threading.enumerate() if each.name == "splitrun memory"]:
        thread.join()
    assert regions.fetched_bytes() in (0, len(ahead) - REGION_BYTES - (-regions.address(ahead) % HUGE_PAGE_BYTES))
    assert regions.open_region(REGION_BYTES * 8, REGION_BYTES) is not ahead
    assert regions.open_region(REGION_BYTES * 2, REGION_BYTES) is ahead
    assert regions.fetched_bytes() == 0
    assert regions.open_region(REGION_BYTES, REGION_BYTES) is not ahead


def test_what_was_fetched_ahead_in_vain_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "_ahead", regions._Ahead())
    regions.fetch_ahead(REGION_BYTES)
    regions.fetch_ahead(REGION_BYTES)  # a second wish is not heard
    region = weakref.ref(regions._ahead.region)
    regions.drop_ahead()
    for thread in [each for each in threading.enumerate() if each.name == "splitrun memory"]:
        thread.join()
    gc.collect()
    assert region() is None
    assert regions.fetched_bytes() == 0
