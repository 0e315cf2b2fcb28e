"""The memory of packed weights: alignment, sharing of regions, and their end."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

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
