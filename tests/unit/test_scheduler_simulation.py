"""The scheduler against a stage that remembers only what the steps let it store.

The stage keeps token ids in blocks, and state by slot, exactly where the steps say, and computes the next token from
what it reads back there. A block with two owners, a block freed too early, a gap in the positions or a chunk out of
order therefore changes the output. The reference is the same function of the plain history: the request run alone.
"""

from __future__ import annotations

import random
import zlib
from collections import deque
from dataclasses import dataclass, field

import numpy
import pytest

from splitrun.schedule.blocks import SCORED_CHUNK_TOKENS, blocks_per_session
from splitrun.schedule.draft import Draft
from splitrun.schedule.request import Request, SamplingParams, TokenEvent, TokenLogprob
from splitrun.schedule.scheduler import GroupSpec, Limits, Scheduler
from splitrun.schedule.step import RowTokens, Step, Tokens

VOCABULARY = 97
EOS = 5


def next_token(history: list[int], seed: int) -> int:
    """A stand-in for model and sampler: depends on every token, their order, the seed and the position."""
    return zlib.crc32(bytes(history) + seed.to_bytes(8, "little") + len(history).to_bytes(4, "little")) % VOCABULARY


def window_digest(history: list[int], window: int, seed: int) -> int:
    return next_token(history[-window:], seed + window)


def model(history: list[int], windows: list[int], seed: int) -> int:
    digests = [next_token(history, seed)] + [window_digest(history, window, seed) for window in windows]
    return sum(digests) % VOCABULARY


def run_alone(request: Request, windows: list[int], context: int) -> tuple[list[int], str]:
    params, history = request.sampling, list(request.prompt)
    limit = min(context, len(history) + (params.max_tokens or context))
    assert params.seed is not None
    while True:
        history.append(model(history, windows, params.seed))
        stopped = history[-1] in params.stop_token_ids
        if stopped or (history[-1] in request.eos_token_ids and not params.ignore_eos):
            return history[len(request.prompt) :], "stop"
        if len(history) == limit:
            return history[len(request.prompt) :], "length"


@dataclass
class FakeStage:
    """Blocks of token ids per group, and the tokens seen per slot (the state group)."""

    groups: tuple[GroupSpec, ...]
    limits: Limits
    randomness: random.Random
    blocks: dict[str, dict[tuple[int, int], int]] = field(default_factory=dict)
    state: dict[int, list[int]] = field(default_factory=dict)

    def run(self, step: Step) -> Tokens:
        """Runs the rows in any order: some stages write all rows first, some finish one row before the next."""
        rows = list(range(step.rows))
        self.randomness.shuffle(rows)
        outcomes: dict[int, RowTokens] = {}
        if self.randomness.random() < 0.5:
            for row in rows:
                self.write(step, row)
            for row in rows:
                outcomes[row] = self.read(step, row)
        else:
            for row in rows:
                self.write(step, row)
                outcomes[row] = self.read(step, row)
        return Tokens(step.index, step.epoch, tuple(outcomes[row] for row in range(step.rows)))

    def tokens(self, step: Step, row: int) -> list[int]:
        return [int(token) for token in step.token_ids[step.query_starts[row] : step.query_starts[row + 1]]]

    def place(self, step: Step, row: int, group: str, position: int) -> tuple[int, int]:
        block = int(step.block_tables[group][row, position // self.limits.block_tokens])
        assert block >= 0, f"no block for position {position} in {group}"
        return block, position % self.limits.block_tokens

    def write(self, step: Step, row: int) -> None:
        context, slot = int(step.context_lengths[row]), int(step.slots[row])
        if context == 0:
            self.state[slot] = []
        assert len(self.state[slot]) == context, "positions are not contiguous"
        self.state[slot].extend(self.tokens(step, row))
        for offset, token in enumerate(self.tokens(step, row)):
            for group in self.groups:
                cell = self.place(step, row, group.name, context + offset)
                self.blocks.setdefault(group.name, {})[cell] = token

    def read(self, step: Step, row: int) -> RowTokens:
        context, end = int(step.context_lengths[row]), int(step.context_lengths[row] + step.counts[row])
        histories: dict[str, list[int]] = {}
        for group in self.groups:
            first = 0 if group.window is None else max(0, context - (group.window - 1))
            cells = [self.place(step, row, group.name, position) for position in range(first, end)]
            histories[group.name] = [self.blocks[group.name][cell] for cell in cells]
            assert histories[group.name] == self.state[int(step.slots[row])][first:], "a block was overwritten"
        targets = (step.prompt_targets or {}).get(row, ())
        assert (row in (step.prompt_targets or {})) == (step.prompt_logprobs[row] is not None)
        logprobs = tuple(TokenLogprob(target, -float(context + at + 1)) for at, target in enumerate(targets))
        sampling = step.sampling[row]
        if sampling is None:
            return RowTokens(prompt_logprobs=logprobs)
        assert sampling.position == end
        digests = [
            window_digest(histories[group.name], group.window, sampling.seed) for group in self.groups if group.window
        ]
        token = (next_token(self.state[int(step.slots[row])], sampling.seed) + sum(digests)) % VOCABULARY
        return RowTokens((token,), prompt_logprobs=logprobs)


@dataclass
class Simulation:
    """Requests arrive, steps wait in the pipeline, tokens come back late, some requests are cancelled."""

    scheduler: Scheduler
    stage: FakeStage
    randomness: random.Random
    submitted: dict[int, Request] = field(default_factory=dict)
    events: dict[int, list[TokenEvent]] = field(default_factory=dict)
    queue: deque[Step] = field(default_factory=deque)
    results: deque[Tokens] = field(default_factory=deque)
    drafts: random.Random | None = None
    """When set, the next step is drafted at moments that it decides."""
    steps: list[Step] = field(default_factory=list)
    replays: int = 0
    went_back: int = 0
    refills: int = 0

    def check(self, step: Step) -> None:
        limits = self.scheduler.limits
        filling = 0
        if step.refill:
            assert step.sampling == (None,) * step.rows, "nothing new is to come of tokens that are computed again"
            self.refills += 1
        for row in range(step.rows):
            context, count = int(step.context_lengths[row]), int(step.counts[row])
            if step.replay[row]:
                assert 2 <= count <= 16
                self.replays += 1
            elif count > 1:
                scored = self.submitted[step.requests[row]].sampling.prompt_logprobs is not None
                chunk = min(limits.chunk_tokens, SCORED_CHUNK_TOKENS) if scored else limits.chunk_tokens
                assert context % chunk == 0, "a prompt was cut elsewhere"
            filling += count if count > 1 else 0
        assert filling <= limits.chunk_tokens
        assert len(set(step.slots.tolist())) == step.rows

    def record(self, events: list[TokenEvent]) -> None:
        for event in events:
            self.events[event.request_id].append(event)

    def submit(self, request: Request) -> None:
        self.submitted[request.request_id] = request
        self.events[request.request_id] = []
        self.scheduler.submit(request)

    def advance(self) -> None:
        """One random action of the engine or the pipeline."""
        if self.drafts is not None and self.drafts.random() < 0.5:
            self.scheduler.prepare()
            self.scheduler.check_integrity()
        action = self.randomness.random()
        if action < 0.4:
            step = self.scheduler.schedule()
            if step is not None:
                self.check(step)
                self.steps.append(step)
                self.queue.append(step)
            else:
                assert self.scheduler.in_flight or not self.scheduler.has_work, "the scheduler is stuck"
        elif action < 0.7 and self.queue:
            self.results.append(self.stage.run(self.queue.popleft()))
        elif self.results:
            self.record(self.scheduler.commit(self.results.popleft()))
        self.scheduler.check_integrity()

    def cancel(self, request_id: int) -> None:
        event = self.scheduler.cancel(request_id)
        if event is not None:
            self.record([event])
        self.scheduler.check_integrity()

    def lose_one_stage(self) -> None:
        """What came through is held by the others; the lost one gets some of it back, or nothing."""
        self.scheduler.halt()
        self.scheduler.check_integrity()
        ends = {held.request_id: self.randomness.randint(0, held.tokens) for held in self.scheduler.held()}
        if ends and self.randomness.random() < 0.3:
            self.cancel(self.randomness.choice(list(ends)))
        self.scheduler.go_back(ends, self.randomness.choice([(), (2,), (0, 2)]))
        self.scheduler.check_integrity()
        self.results.extend(Tokens(step.index, step.epoch, ()) for step in self.queue)
        self.queue.clear()
        state: dict[int, list[int]] = {}
        blocks: dict[str, dict[tuple[int, int], int]] = {}
        for held in self.scheduler.held():
            assert held.tokens <= ends[held.request_id]
            self.went_back += held.tokens > 0
            state[held.slot] = self.stage.state[held.slot][: held.tokens]
            for name, table in held.tables.items():
                room = self.scheduler.limits.block_tokens
                cells = [(table[at // room], at % room) for at in range(held.tokens)]
                mine = {cell: self.stage.blocks[name][cell] for cell in cells if cell[0] >= 0}
                blocks.setdefault(name, {}).update(mine)
        self.stage.state, self.stage.blocks = state, blocks

    def lose_stages(self) -> None:
        """All KV is gone; steps in flight may still run and answer, under the old epoch."""
        self.scheduler.recompute_all()
        self.scheduler.check_integrity()
        stale = [Tokens(step.index, step.epoch, ()) for step in self.queue]
        self.queue.clear()
        self.results.extend(stale)
        self.stage.blocks.clear()
        self.stage.state.clear()

    def finish(self) -> None:
        for _ in range(100_000):
            if not self.scheduler.has_work and not self.scheduler.in_flight:
                return
            self.advance()
        raise AssertionError("the scheduler never finishes")

    def verify(self, windows: list[int]) -> None:
        for request_id, request in self.submitted.items():
            events = self.events[request_id]
            output = [token for event in events for token in event.token_ids]
            tokens, reason = run_alone(request, windows, self.scheduler.capacity)
            assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
            if events[-1].finish_reason == "cancelled":
                assert output == tokens[: len(output)]
            else:
                assert (output, events[-1].finish_reason) == (tokens, reason)
            if request.sampling.prompt_logprobs is not None and output:
                expected = [TokenLogprob(token, -float(at)) for at, token in enumerate(request.prompt)]
                assert events[0].prompt_logprobs == (None, *expected[1:])
            assert all(event.prompt_logprobs is None for event in events[1:])
        statistics = self.scheduler.statistics()
        assert (statistics.running, statistics.waiting) == (0, 0)
        assert all(used == 0 for used, _ in statistics.blocks.values())


def make_request(request_id: int, randomness: random.Random, longest: int) -> Request:
    params = SamplingParams(
        max_tokens=randomness.choice([None, 1, 3, randomness.randint(1, longest)]),
        seed=randomness.getrandbits(32),
        ignore_eos=randomness.random() < 0.7,
        stop_token_ids=(7,) if randomness.random() < 0.2 else (),
        prompt_logprobs=randomness.choice([None, None, 0, 2]),
    )
    length = randomness.choice([1, randomness.randint(1, longest - 1), randomness.randint(1, max(1, longest // 3))])
    prompt = tuple(randomness.randrange(VOCABULARY) for _ in range(length))
    return Request(request_id, prompt, params, eos_token_ids=(EOS,))


def build(randomness: random.Random, depth: int) -> tuple[Simulation, list[int]]:
    windows = randomness.choice([[], [], [1], [6], [9, 30]])
    limits = Limits(
        context=randomness.choice([12, 40, 90]),
        sessions=randomness.choice([1, 2, 3, 6]),
        vocabulary=VOCABULARY,
        chunk_tokens=randomness.choice([1, 4, 7, 16, 64]),
        block_tokens=randomness.choice([1, 4, 8]),
        depth=depth,
        max_waiting=1000,
    )
    full = -(-limits.context // limits.block_tokens)
    least = -(-4 // limits.block_tokens)
    groups = [GroupSpec("full", None, randomness.choice([full, full, full + 1, 2 * full, max(least, full // 2)]))]
    for window in windows:
        peak = blocks_per_session(window, limits.context, limits.chunk_tokens, limits.block_tokens)
        blocks = max(least, randomness.randint(peak - 1, 2 * peak + 1))
        groups.append(GroupSpec(f"sliding({window})", window, blocks))
    if randomness.random() < 0.1:
        groups = groups[1:]
    scheduler = Scheduler(tuple(groups), limits, random.Random(0))
    stage = FakeStage(tuple(groups), limits, randomness)
    return Simulation(scheduler, stage, randomness), windows


def run_at_random(seed: int, depth: int, drafts: random.Random | None = None) -> Simulation:
    """Requests of all kinds, some of them cancelled, and stages lost now and then."""
    randomness = random.Random(1000 * depth + seed)
    simulation, windows = build(randomness, depth)
    simulation.drafts = drafts
    disturbed = seed % 2 == 1
    for request_id in range(randomness.randint(1, 12)):
        simulation.submit(make_request(request_id, randomness, simulation.scheduler.capacity))
        for _ in range(randomness.choice([0, 0, 5, 60])):
            simulation.advance()
        if disturbed and randomness.random() < 0.3:
            simulation.cancel(randomness.randint(0, request_id))
        if disturbed and randomness.random() < 0.1:
            simulation.lose_stages()
        if disturbed and randomness.random() < 0.2:
            simulation.lose_one_stage()
    simulation.finish()
    simulation.verify(windows)
    return simulation


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(40))
def test_every_request_gets_what_it_gets_alone(seed: int, depth: int) -> None:
    run_at_random(seed, depth)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that drafts became."""
    found: list[int] = []
    complete = Draft.complete

    def counted(self: Draft) -> Step:
        found.append(self.step.index)
        return complete(self)

    monkeypatch.setattr(Draft, "complete", counted)
    return found


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_drafts_change_no_step(depth: int, used: list[int]) -> None:
    for seed in range(40):
        plain, drafted = run_at_random(seed, depth), run_at_random(seed, depth, random.Random(seed))
        assert len(plain.steps) == len(drafted.steps)
        for one, other in zip(plain.steps, drafted.steps, strict=True):
            for name, value in vars(one).items():
                numpy.testing.assert_equal(getattr(other, name), value, f"{name} of step {one.index}")
    assert len(used) > 10


@pytest.mark.parametrize("sessions", [1, 4])
def test_decoding_goes_by_drafts_but_where_a_block_is_full(sessions: int, used: list[int]) -> None:
    limits = Limits(context=200, sessions=sessions, vocabulary=VOCABULARY, chunk_tokens=32, block_tokens=16, depth=2)
    groups = (GroupSpec("full", None, 13 * sessions),)
    simulation = Simulation(Scheduler(groups, limits), FakeStage(groups, limits, random.Random(1)), random.Random(1))
    for request_id in range(sessions):
        simulation.submit(Request(request_id, (1, 2, 3), SamplingParams(max_tokens=160, seed=3, ignore_eos=True)))
    steps, expected = 0, None
    while simulation.scheduler.has_work:
        while (step := simulation.scheduler.schedule()) is not None:
            assert step is expected or step.index not in used  # stages have made ready for that very object
            simulation.queue.append(step)
            steps += 1
        expected = simulation.scheduler.prepare()
        simulation.record(simulation.scheduler.commit(simulation.stage.run(simulation.queue.popleft())))
    simulation.verify([])
    assert steps * 0.85 < len(used) < steps


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_preemption_is_exact_and_happens(depth: int) -> None:
    """Six sequences that each may fill the pool alone: they must throw each other out and still be exact."""
    randomness = random.Random(depth)
    limits = Limits(context=80, sessions=6, vocabulary=VOCABULARY, chunk_tokens=32, block_tokens=4, depth=depth)
    groups = (GroupSpec("full", None, 24), GroupSpec("sliding(9)", 9, 24))
    stage = FakeStage(groups, limits, randomness)
    simulation = Simulation(Scheduler(groups, limits), stage, randomness)
    for request_id in range(6):
        params = SamplingParams(seed=request_id, ignore_eos=True, prompt_logprobs=1)
        prompt = tuple(randomness.randrange(VOCABULARY) for _ in range(3 + 4 * request_id))
        simulation.submit(Request(request_id, prompt, params))
    simulation.finish()
    simulation.verify([9])
    assert simulation.scheduler.statistics().preemptions > 0
    assert simulation.replays > 0


@pytest.mark.parametrize("depth", [1, 3])
def test_a_lost_stage_costs_only_what_it_does_not_get_back(depth: int) -> None:
    """Again and again, in prompts and while decoding; windows that were left behind are computed from their start."""
    randomness = random.Random(depth)
    limits = Limits(context=80, sessions=4, vocabulary=VOCABULARY, chunk_tokens=8, block_tokens=4, depth=depth)
    groups = (GroupSpec("full", None, 80), GroupSpec("sliding(9)", 9, 40))
    simulation = Simulation(Scheduler(groups, limits), FakeStage(groups, limits, randomness), randomness)
    for request_id in range(6):
        params = SamplingParams(seed=request_id, ignore_eos=True, prompt_logprobs=1 if request_id % 2 else None)
        prompt = tuple(randomness.randrange(VOCABULARY) for _ in range(3 + 4 * request_id))
        simulation.submit(Request(request_id, prompt, params))
        for _ in range(3):
            for _ in range(60):
                simulation.advance()
            simulation.lose_one_stage()
    simulation.finish()
    simulation.verify([9])
    assert simulation.went_back > 0
    assert simulation.refills > 0
