"""The scheduler's decisions one by one: what is refused, what shares a step, who yields, how requests end."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from splitrun.errors import ContextTooLong, InvalidPlacement, InvalidRequest, QueueFull, SplitrunError
from splitrun.schedule.blocks import blocks_per_session
from splitrun.schedule.request import Request, SamplingParams, TokenEvent, TokenLogprob
from splitrun.schedule.scheduler import GroupSpec, Limits, Scheduler
from splitrun.schedule.step import RowTokens, Step, Tokens

LIMITS = Limits(context=64, sessions=4, vocabulary=100, chunk_tokens=8, block_tokens=4)
FULL = GroupSpec("full", None, 64)


def make(blocks: int = 64, **changes: int) -> Scheduler:
    return Scheduler((replace(FULL, blocks=blocks),), replace(LIMITS, **changes), random.Random(0))


def request(request_id: int, prompt: int, max_tokens: int | None = None, **sampling: Any) -> Request:
    params = SamplingParams(max_tokens=max_tokens, **sampling)
    return Request(request_id, tuple(range(1, prompt + 1)), params, eos_token_ids=(99,))


def answer(step: Step, token: int = 50) -> Tokens:
    rows = tuple(RowTokens(() if wanted is None else (token,)) for wanted in step.sampling)
    return Tokens(step.index, step.epoch, rows)


def run(scheduler: Scheduler, token: int = 50) -> tuple[Step, list[TokenEvent]]:
    step = scheduler.schedule()
    assert step is not None
    events = scheduler.commit(answer(step, token))
    scheduler.check_integrity()
    return step, events


def test_one_request_from_prompt_to_end() -> None:
    scheduler = make()
    scheduler.submit(request(7, prompt=11, max_tokens=2, seed=5))
    first, events = run(scheduler)
    assert (first.token_ids.tolist(), first.context_lengths.tolist(), events) == ([1, 2, 3, 4, 5, 6, 7, 8], [0], [])
    assert (first.sampling, first.replay, first.prompt_targets) == ((None,), (False,), None)
    assert first.block_tables["full"].tolist() == [[0, 1]]
    second, events = run(scheduler)
    assert (second.token_ids.tolist(), second.query_starts.tolist()) == ([9, 10, 11], [0, 3])
    assert second.sampling[0] is not None
    assert (second.sampling[0].seed, second.sampling[0].position) == (5, 11)
    assert events == [TokenEvent(7, (50,))]
    third, events = run(scheduler, token=51)
    assert (third.token_ids.tolist(), third.context_lengths.tolist()) == ([50], [11])
    assert events == [TokenEvent(7, (51,), finish_reason="length")]
    assert (scheduler.has_work, scheduler.in_flight, scheduler.schedule()) == (False, 0, None)
    assert scheduler.statistics().blocks == {"full": (0, 64)}
    assert {array.dtype.name for array in (third.token_ids, third.slots, third.block_tables["full"])} == {"int32"}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (request(1, 0), InvalidRequest, "no tokens"),
        (replace(request(1, 2), prompt=(1, 100)), InvalidRequest, "the prompt has token id 100: ids must be 0 to 99"),
        (replace(request(1, 2), prompt=(1, -1)), InvalidRequest, "token id -1"),
        (request(1, 2, logit_bias={100: 1.0}), InvalidRequest, "logit_bias has token id 100"),
        (request(1, 80), ContextTooLong, "the prompt has 80 tokens, the placement holds 64: plan with --context 1024"),
        (request(1, 64, 2000), ContextTooLong, "holds 64 with a new one: plan with --context 3072"),
        (request(0, 2), InvalidRequest, "request 0 runs already"),
    ],
)
def test_refusals(wrong: Request, error: type[SplitrunError], message: str) -> None:
    scheduler = make(vocabulary=100)
    scheduler.submit(request(0, 1))
    with pytest.raises(error, match=message):
        scheduler.submit(wrong)
    assert scheduler.statistics().waiting == 1


def test_the_queue_is_bounded_by_what_waits_not_by_what_runs() -> None:
    scheduler = make(max_waiting=2, sessions=1)
    scheduler.submit(request(0, 1))
    run(scheduler)
    scheduler.submit(request(1, 1))
    scheduler.submit(request(2, 1))
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        scheduler.submit(request(3, 1))


def test_a_prompt_that_the_blocks_can_never_hold_is_refused_and_shorter_ones_end_in_time() -> None:
    scheduler = make(blocks=3)
    with pytest.raises(ContextTooLong, match="the placement holds 12 with a new one: the KV blocks"):
        scheduler.submit(request(0, 12))
    scheduler.submit(request(1, 10, max_tokens=40))
    events = [event for _ in range(3) for event in run(scheduler)[1]]
    assert [event.finish_reason for event in events] == [None, "length"]


@pytest.mark.parametrize(
    ("prompts", "counts"),
    [
        ([3, 3, 2, 1], [[3, 3, 2], [1, 1, 1, 1]]),  # eight tokens share a step, the ninth waits
        ([5, 4, 1], [[5], [1, 4, 1]]),  # first come first served: the short one does not overtake
        ([20, 2], [[8], [8], [4, 2], [1, 1]]),  # chunks end at multiples of eight, whatever else runs
        ([9, 8], [[8], [1], [1, 8]]),  # a chunk goes whole or not at all
    ],
)
def test_prompts_share_the_budget(prompts: list[int], counts: list[list[int]]) -> None:
    scheduler = make()
    for request_id, prompt in enumerate(prompts):
        scheduler.submit(request(request_id, prompt))
    assert [run(scheduler)[0].counts.tolist() for _ in counts] == counts


def test_decoding_goes_on_beside_a_long_prompt() -> None:
    scheduler = make()
    scheduler.submit(request(0, 2))
    run(scheduler)
    scheduler.submit(request(1, 40))
    for _ in range(5):
        step, events = run(scheduler)
        assert step.counts.tolist() == [1, 8]
        assert 0 in [event.request_id for event in events]


def test_chunks_of_one_prompt_follow_each_other_without_waiting() -> None:
    scheduler = make(depth=3)
    scheduler.submit(request(0, 30))
    steps = [scheduler.schedule() for _ in range(3)]
    assert [step.context_lengths.tolist() for step in steps if step] == [[0], [8], [16]]
    assert scheduler.schedule() is None  # three are in flight
    assert [scheduler.commit(answer(step)) for step in steps if step] == [[], [], []]
    step, events = run(scheduler)
    assert (step.context_lengths.tolist(), events) == ([24], [TokenEvent(0, (50,))])


@pytest.mark.parametrize(("depth", "sizes"), [(1, [4]), (2, [2, 2]), (3, [2, 2]), (4, [1, 1, 1, 1])])
def test_decode_rows_are_spread_over_the_depth(depth: int, sizes: list[int]) -> None:
    decodes_in(make(depth=depth), sizes)


@pytest.mark.parametrize(("streams", "sizes"), [(1, [4]), (2, [2, 2]), (4, [1, 1, 1])])
def test_decode_rows_are_spread_over_the_streams_of_a_plan(streams: int, sizes: list[int]) -> None:
    decodes_in(make(depth=3, streams=streams), sizes)


def decodes_in(scheduler: Scheduler, sizes: list[int]) -> None:
    """Four sequences decode in steps of these sizes, in order, nobody twice before the others."""
    for request_id in range(4):
        scheduler.submit(request(request_id, 2))
    run(scheduler)
    for _ in range(3):
        steps = []
        while (step := scheduler.schedule()) is not None:
            steps.append(step)
        assert [step.rows for step in steps] == sizes
        slots = [slot for step in steps for slot in step.slots.tolist()]
        assert len(set(slots)) == len(slots) == sum(sizes)
        for step in steps:
            scheduler.commit(answer(step))


def test_admission_waits_for_a_slot_and_keeps_the_order() -> None:
    scheduler = make(sessions=2)
    for request_id in range(3):
        scheduler.submit(request(request_id, 2, max_tokens=2))
    run(scheduler)
    assert (scheduler.statistics().running, scheduler.statistics().waiting) == (2, 1)
    run(scheduler)
    step, _ = run(scheduler)
    assert (step.slots.tolist(), step.counts.tolist()) == ([0], [2])


def test_admission_leaves_the_running_room_to_grow() -> None:
    scheduler = make(blocks=4, context=16)
    scheduler.submit(request(0, 8))
    run(scheduler)
    scheduler.submit(request(1, 4))  # request 0 takes a third block now; the fourth is kept for it
    step, _ = run(scheduler)
    assert step.counts.tolist() == [1]
    scheduler.cancel(0)
    step, _ = run(scheduler)
    assert step.counts.tolist() == [4]


def test_admission_sets_aside_what_a_sequence_needs_to_be_computed_again() -> None:
    scheduler = make(blocks=12, chunk_tokens=64)
    scheduler.submit(request(0, 4, max_tokens=44))
    for _ in range(41):
        run(scheduler)
    scheduler.recompute_all()  # 45 tokens known: twelve blocks, four tokens of them in the next step
    scheduler.submit(request(1, 4))
    assert [run(scheduler)[0].counts.tolist() for _ in range(4)] == [[4], [16], [16], [9]]
    assert scheduler.statistics().waiting == 1


def test_the_newest_yields_and_continues_where_it_was() -> None:
    scheduler = make(blocks=4, context=16)
    scheduler.submit(request(0, 3))
    scheduler.submit(request(1, 3))
    outputs: dict[int, list[int]] = {0: [], 1: []}
    tokens, replayed = 50, []
    while scheduler.has_work:
        step, events = run(scheduler, token=tokens)
        tokens += 1
        replayed += [step.token_ids[step.query_starts[row] :].tolist() for row in range(step.rows) if step.replay[row]]
        for event in events:
            outputs[event.request_id] += event.token_ids
    assert scheduler.statistics().preemptions == 1
    assert [len(output) for output in outputs.values()] == [13, 13]
    assert outputs[1] == sorted(outputs[1])  # nothing is chosen twice
    assert replayed == [outputs[1][:6]]


def test_a_sequence_in_flight_does_not_yield_until_its_tokens_are_back() -> None:
    scheduler = make(blocks=4, context=16, depth=2)
    scheduler.submit(request(0, 4))
    scheduler.submit(request(1, 2))
    run(scheduler)
    older, newer = scheduler.schedule(), scheduler.schedule()
    assert older is not None
    assert newer is not None
    for context in range(4, 8):  # request 0 goes ahead while the step of request 1 is under way
        assert older.context_lengths.tolist() == [context]
        assert newer.context_lengths.tolist() == [context - 2]
        scheduler.commit(answer(older))
        older = scheduler.schedule()
        if older is None:
            break
        scheduler.commit(answer(newer))
        newer = scheduler.schedule()
        assert newer is not None
    assert (older, context, scheduler.statistics().preemptions) == (None, 7, 0)
    scheduler.commit(answer(newer))
    after = scheduler.schedule()
    assert after is not None
    assert after.context_lengths.tolist() == [8]
    assert scheduler.statistics().preemptions == 1
    scheduler.check_integrity()


def test_cancel_frees_at_once_and_late_tokens_are_dropped() -> None:
    scheduler = make(depth=2)
    scheduler.submit(request(0, 3))
    scheduler.submit(request(1, 3))
    step = scheduler.schedule()
    assert step is not None
    assert scheduler.cancel(0) == TokenEvent(0, finish_reason="cancelled")
    assert scheduler.statistics().blocks == {"full": (1, 64)}
    assert scheduler.cancel(0) is None
    assert [event.request_id for event in scheduler.commit(answer(step))] == [1]
    scheduler.submit(request(0, 3))  # the id may be used again
    scheduler.cancel(0)  # while it waits
    assert scheduler.statistics().waiting == 0
    scheduler.check_integrity()


def test_failures_end_requests_with_the_message() -> None:
    scheduler = make()
    for request_id in range(3):
        scheduler.submit(request(request_id, 3))
    step = scheduler.schedule()
    assert step is not None
    assert scheduler.fail([1, 1, 77], "lost") == [TokenEvent(1, finish_reason="error", error="lost")]
    assert scheduler.in_flight == 1
    assert [event.request_id for event in scheduler.fail_all("gone")] == [0, 2]
    assert (scheduler.in_flight, scheduler.has_work) == (0, False)
    assert scheduler.commit(answer(step)) == []  # of the old epoch
    scheduler.submit(request(5, 3))
    after, events = run(scheduler)
    assert (after.epoch, after.index, len(events)) == (step.epoch + 1, step.index + 1, 1)


def test_steps_must_come_back_in_order() -> None:
    scheduler = make(depth=2)
    scheduler.submit(request(0, 16))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None
    assert second is not None
    with pytest.raises(AssertionError, match="before those of step 0"):
        scheduler.commit(answer(second))


def test_several_accepted_tokens_stop_at_the_end_of_the_request() -> None:
    scheduler = make()
    scheduler.submit(request(0, 3, logprobs=0))
    step = scheduler.schedule()
    assert step is not None
    logprobs = tuple(TokenLogprob(token, -1.0) for token in (50, 99, 51))
    events = scheduler.commit(Tokens(step.index, step.epoch, (RowTokens((50, 99, 51), logprobs),)))
    assert events == [TokenEvent(0, (50, 99), logprobs[:2], finish_reason="stop")]


def test_a_scored_prompt_has_room_in_the_smallest_pool_of_a_window() -> None:
    """Its chunks are shorter than others' and end elsewhere: it may hold a block more."""
    limits = Limits(context=64, sessions=1, vocabulary=100, chunk_tokens=40, block_tokens=8)
    blocks = blocks_per_session(16, limits.context, limits.chunk_tokens, limits.block_tokens)
    scheduler = Scheduler((GroupSpec("window", 16, blocks),), limits, random.Random(0))
    scheduler.submit(request(0, 63, max_tokens=1, prompt_logprobs=0))
    for _ in range(3):
        if not scheduler.has_work:
            break
        step = scheduler.schedule()
        assert step is not None, "nothing can be scheduled, and a request waits"
        targets = (step.prompt_targets or {}).get(0, ())
        scored = tuple(TokenLogprob(target, -1.0) for target in targets)
        tokens = (50,) if step.sampling[0] is not None else ()
        scheduler.commit(Tokens(step.index, step.epoch, (RowTokens(tokens, prompt_logprobs=scored),)))
    assert not scheduler.has_work


def test_prompt_logprobs_arrive_once_with_the_first_token() -> None:
    scheduler = make()
    scheduler.submit(request(0, 10, max_tokens=2, prompt_logprobs=1))
    collected = []
    for targets in ([2, 3, 4, 5, 6, 7, 8, 9], [10], None):
        step = scheduler.schedule()
        assert step is not None
        assert step.prompt_targets == (None if targets is None else {0: tuple(targets)})
        assert step.prompt_logprobs == (None if targets is None else 1,)
        found = tuple(TokenLogprob(target, -0.5) for target in targets or ())
        tokens = () if step.sampling[0] is None else (50,)
        collected += scheduler.commit(Tokens(step.index, step.epoch, (RowTokens(tokens, prompt_logprobs=found),)))
    expected = (None, *(TokenLogprob(token, -0.5) for token in range(2, 11)))
    assert [event.prompt_logprobs for event in collected] == [expected, None]


def test_seeds_are_kept_or_drawn() -> None:
    scheduler = make()
    for request_id, seed in enumerate([7, None, None]):
        scheduler.submit(request(request_id, 1, seed=seed))
    step = scheduler.schedule()
    assert step is not None
    seeds = [row.seed for row in step.sampling if row is not None]
    assert (seeds[0], len(set(seeds))) == (7, 3)


@pytest.mark.parametrize("name", ["context", "sessions", "vocabulary", "chunk_tokens", "block_tokens", "depth"])
def test_impossible_limits_are_refused(name: str) -> None:
    with pytest.raises(InvalidPlacement, match=f"{name} is 0"):
        replace(LIMITS, **{name: 0})
