"""Who yields blocks to whom, with sequences placed by hand."""

from __future__ import annotations

import pytest

from splitrun.schedule.blocks import GroupSpec
from splitrun.schedule.limits import Limits
from splitrun.schedule.request import Request, SamplingParams
from splitrun.schedule.roster import Roster
from splitrun.schedule.sequence import Sequence, State

LIMITS = Limits(context=16, sessions=3, vocabulary=10, chunk_tokens=16, block_tokens=4)


def place(lengths: list[int]) -> tuple[Roster, list[Sequence]]:
    """Sequences in order of arrival that hold the blocks of so many tokens, in a pool that is then full."""
    roster = Roster((GroupSpec("full", None, sum(-(-length // 4) for length in lengths)),), LIMITS)
    sequences = []
    for arrival, length in enumerate(lengths):
        sequence = Sequence(Request(arrival, (1,) * length, SamplingParams()), arrival, seed=0, token_limit=16)
        roster.enqueue(sequence)
        roster.start(sequence)
        roster.accounts.extend(sequence, length)
        sequence.scheduled = length
        sequences.append(sequence)
    roster.check_integrity()
    return roster, sequences


@pytest.mark.parametrize(
    ("lengths", "asking", "end", "in_flight", "served", "yielding"),
    [
        ([4, 4, 8], 0, 4, [], True, []),  # it has what it needs
        ([4, 4, 8], 0, 8, [], True, [2]),  # the newest yields
        ([4, 4, 8], 0, 12, [], True, [2]),
        ([4, 4, 8], 0, 16, [], True, [1, 2]),
        ([4, 4, 8], 0, 8, [2], False, []),  # the newest has a step in flight: no older one yields in its place
        ([4, 4, 8], 0, 12, [1], True, [2]),
        ([4, 4, 8], 0, 16, [1], False, []),  # too little without that one: nobody yields in vain
        ([4, 4, 8], 1, 12, [], True, [2]),
        ([4, 4, 8], 1, 16, [], False, []),  # the older one is never asked
        ([4, 4, 8], 2, 12, [], False, []),
    ],
)
def test_who_yields(
    lengths: list[int], asking: int, end: int, in_flight: list[int], served: bool, yielding: list[int]
) -> None:
    roster, sequences = place(lengths)
    for arrival in in_flight:
        sequences[arrival].in_flight = 1
    assert roster.make_room(sequences[asking], end) == served
    roster.check_integrity()
    assert [one.arrival for one in sequences if one.state is State.WAITING] == yielding
    assert [one.preemptions for one in sequences] == [int(one.arrival in yielding) for one in sequences]
    assert roster.preemptions == len(yielding)
    if served:
        roster.accounts.extend(sequences[asking], end)


def test_what_is_thrown_out_returns_to_its_place_in_the_queue() -> None:
    roster, (_, second, third) = place([4, 4, 4])
    late = Sequence(Request(9, (1,), SamplingParams()), 3, seed=0, token_limit=16)
    roster.enqueue(late)
    roster.suspend(third)
    roster.suspend(second)
    assert roster.next_candidate() is second
    roster.start(second)
    assert (roster.waiting, second.slot, second.scheduled) == (2, 1, 0)


def test_the_integrity_check_finds_a_sequence_that_left_without_its_blocks() -> None:
    roster, (first, *_) = place([4, 4])
    roster.running.remove(first)
    with pytest.raises(AssertionError, match="block tables and running sequences differ"):
        roster.check_integrity()


def test_the_integrity_check_finds_a_slot_with_two_owners() -> None:
    roster, (first, second) = place([4, 4])
    first.slot = second.slot
    with pytest.raises(AssertionError, match="slot"):
        roster.check_integrity()
