"""The memory of packed weights: alignment, sharing of regions, and their end."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path

import pytest
import torch

from splitrun.kernels.cpu import regions
from splitrun.kernels.cpu.arena import REGION_BYTES, Arena, fetch, zeros
from splitrun.kernels.cpu.regions import ALIGNMENT, HUGE_PAGE_BYTES, SMALL_BYTES


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


def test_a_region_set_aside_is_filled_until_it_is_taken_and_counts_until_then() -> None:
    aside = regions.set_aside(REGION_BYTES)
    places = []

    def read(target: memoryview, address: int) -> None:
        target[:] = bytes([7]) * len(target)
        places.append(address)

    assert aside.fill(ALIGNMENT, 100, read)
    assert regions.filled_bytes() == 100
    region = aside.region
    assert regions.open_region(REGION_BYTES * 2, REGION_BYTES) is not region
    assert regions.open_region(REGION_BYTES, REGION_BYTES) is region
    assert region is not None
    start = regions.first_place(region)
    assert places == [regions.address(region) + start + ALIGNMENT]
    assert region[start + ALIGNMENT : start + ALIGNMENT + 101] == bytes([7]) * 100 + bytes(1)
    assert not aside.fill(0, 100, read)
    assert regions.filled_bytes() == 0
    assert regions.open_region(REGION_BYTES, REGION_BYTES) is not region


def test_what_was_set_aside_in_vain_is_given_back() -> None:
    aside = regions.set_aside(REGION_BYTES)
    region = weakref.ref(aside.region)
    regions.drop_asides()
    gc.collect()
    assert region() is None
    assert not aside.fill(0, 1, lambda target, address: None)


def test_pages_come_from_several_nodes_in_turn() -> None:
    region = regions.new_region(REGION_BYTES)
    if not regions.interleave(region, regions.memory_nodes() or [0]):
        pytest.skip("this system places no memory")
    start = f"{regions.address(region):x} "
    places = Path("/proc/self/numa_maps").read_text(encoding="ascii").splitlines()
    assert [line.split()[1].partition(":")[0] for line in places if line.startswith(start)] == ["interleave"]


def test_which_nodes_a_process_may_use(tmp_path: Path) -> None:
    status, present = tmp_path / "status", tmp_path / "has_memory"
    assert regions.memory_nodes(status, present) == []
    status.write_text("Name:\tpython\nMems_allowed:\t7f\nMems_allowed_list:\t0-2,5\n", encoding="ascii")
    assert regions.memory_nodes(status, present) == []
    present.write_text("1-3,5\n", encoding="ascii")
    assert regions.memory_nodes(status, present) == [1, 2, 5]


@pytest.mark.parametrize("count", [10, SMALL_BYTES, HUGE_PAGE_BYTES + 3])
def test_fetched_zeros_keep_what_was_written_to_them(count: int) -> None:
    ones, others = zeros(count, torch.uint8), zeros(count, torch.uint8)
    ones.fill_(1)
    fetch([ones, others])
    for thread in [each for each in threading.enumerate() if each.name == "splitrun memory"]:
        thread.join()
    assert ones.all()
    assert not others.any()
