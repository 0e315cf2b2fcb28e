"""Continuous batching: which slices form the next step, and what becomes of the tokens that come back.

Order is by arrival everywhere: the queue is first come first served, and when blocks run out a sequence takes them from
the newest one behind it. So the oldest sequence always advances, every sequence becomes the oldest some day, and nobody
starves. Knows integers only: no tensors, no text, no time.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Mapping

from splitrun.errors import InvalidRequest, QueueFull
from splitrun.schedule.assembly import Row, build_step
from splitrun.schedule.blocks import GroupSpec
from splitrun.schedule.draft import Draft, draft
from splitrun.schedule.limits import Limits, check_request, session_tokens
from splitrun.schedule.request import Request, TokenEvent
from splitrun.schedule.roster import Held, Roster, Statistics
from splitrun.schedule.sequence import Sequence, State
from splitrun.schedule.step import RowTokens, Step, Tokens

NO_TOKEN = "the logits hold NaN or infinity: the model's values overflow this format; plan with --weights bf16 or fp32"
"""Why a row has no token that it wanted, or no scores of its prompt."""

__all__ = ["GroupSpec", "Held", "Limits", "Scheduler", "Statistics"]


class Scheduler:
    """Turns requests into steps and the steps' tokens into events. Not thread-safe: one thread owns it.

    ``groups``: the paged KV groups (none for models with fixed state only). ``randomness`` draws the seeds of requests
    without one; the operating system's by default. ``states``: the model also has fixed states, which cannot go back.
    Stages run steps in the order of their index and commit comes in that order too.
    """

    def __init__(
        self,
        groups: tuple[GroupSpec, ...],
        limits: Limits,
        randomness: random.Random | None = None,
        *,
        states: bool = False,
    ) -> None:
        self.limits = limits
        self._states = states
        self._refill: tuple[int, ...] = ()
        self.epoch = 0
        self.capacity = session_tokens(groups, limits)
        self._roster = Roster(groups, limits)
        self._randomness = randomness or random.SystemRandom()
        self._flights: deque[tuple[int, list[Row]]] = deque()
        self._arrivals = 0
        self._steps = 0
        self._draft: Draft | None = None

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises ContextTooLong when no new token fits behind the prompt, InvalidRequest for an empty prompt, ids
        outside the vocabulary or an id in use, QueueFull when ``max_waiting`` requests wait. A ``max_tokens`` beyond
        the context is cut to it: the request then ends with "length".
        """
        check_request(request, self.limits, self.capacity)
        if request.request_id in self._roster.live:
            raise InvalidRequest(f"request {request.request_id} runs already: choose another request_id")
        if self._roster.waiting >= self.limits.max_waiting:
            raise QueueFull(f"{self._roster.waiting} requests are waiting, the most allowed: send it again later")
        sampling = request.sampling
        wanted = self.capacity if sampling.max_tokens is None else len(request.prompt) + sampling.max_tokens
        seed = self._randomness.getrandbits(63) if sampling.seed is None else sampling.seed
        self._roster.enqueue(Sequence(request, self._arrivals, seed, token_limit=min(wanted, self.capacity)))
        self._arrivals += 1

    def schedule(self) -> Step | None:
        """The next step, or None when nothing can run before the next commit or submit.

        Decode rows come first, an even share of them per stream; then prompt chunks and replayed tokens, at
        most ``chunk_tokens`` together, oldest first; then waiting sequences start while slots and blocks last. After
        ``go_back`` the slices that only some stages compute come before everything else, in steps of their own.
        """
        if self.in_flight >= self.limits.depth:
            return None
        drafted, self._draft = self._draft, None
        if drafted is not None and drafted.suits(self._steps, self.epoch, self._roster, self.in_flight):
            return self._send_off(drafted.complete(), drafted.rows)
        if not self._roster.waiting and not any(each.ready or each.refilling for each in self._roster.running):
            return None
        for sequence in self._roster.running:
            self._roster.accounts.drop_outside_windows(sequence)
        rows: list[Row] = []
        refilling = [sequence for sequence in self._roster.running if sequence.refilling]
        if refilling:
            self._add_chunks(rows, refilling)
        else:
            self._add_decodes(rows)
            filling = [sequence for sequence in self._roster.running if sequence.ready and not sequence.decoding]
            self._admit(rows, budget=self._add_chunks(rows, filling))
        if not rows:
            return None
        refill = self._refill if refilling else ()
        return self._send_off(build_step(self._steps, self.epoch, rows, self._roster.accounts, refill), rows)

    def prepare(self) -> Step | None:
        """Make as much of the next step as can be known before the oldest one in flight is committed: all but its
        tokens, for which it has zeros. It changes nothing but how long ``schedule`` takes then, which returns the same
        Step, unless something unexpected happens."""
        self._draft = draft(self._steps, self.epoch, self._roster, self._flights, self.limits)
        return None if self._draft is None else self._draft.step

    def _send_off(self, step: Step, rows: list[Row]) -> Step:
        self._flights.append((step.index, rows))
        self._steps += 1
        return step

    def _add_decodes(self, rows: list[Row]) -> None:
        """Add this step's share of the decode rows, least recently served first.

        With several streams each step takes its share only, so that the next one has rows to run meanwhile.
        """
        decoding = [sequence for sequence in self._roster.running if sequence.decoding]
        share = -(-len(decoding) // (self.limits.streams or self.limits.depth))
        for sequence in sorted(decoding, key=lambda sequence: (sequence.last_step, sequence.arrival)):
            if len(rows) < share and sequence.ready and sequence.state is State.RUNNING:
                self._add(rows, sequence)

    def _add_chunks(self, rows: list[Row], filling: list[Sequence]) -> int:
        """Add prompt chunks and replayed groups of these sequences; returns the tokens left of the step's budget."""
        budget = self.limits.chunk_tokens
        for sequence in sorted(filling, key=lambda sequence: sequence.arrival):
            if sequence.state is State.RUNNING:
                count = sequence.next_slice(self.limits.chunk_tokens).count
                if count <= budget and self._add(rows, sequence):
                    budget -= count
        return budget

    def _admit(self, rows: list[Row], budget: int) -> None:
        """Start waiting sequences in order of arrival while their first slice fits the budget."""
        while (sequence := self._roster.next_candidate()) is not None:
            count = sequence.next_slice(self.limits.chunk_tokens).count
            if count > budget:
                return
            self._roster.start(sequence)
            added = self._add(rows, sequence)
            assert added, "an admitted sequence lacks blocks for its first slice"
            budget -= count

    def _add(self, rows: list[Row], sequence: Sequence) -> bool:
        """Add the next slice of a running sequence, preempting newer ones if it must; False when blocks lack."""
        slice_ = sequence.next_slice(self.limits.chunk_tokens)
        if not self._roster.make_room(sequence, slice_.end):
            return False
        self._roster.accounts.extend(sequence, slice_.end)
        sequence.scheduled = slice_.end
        sequence.in_flight += 1
        sequence.last_step = self._steps
        rows.append((sequence, slice_))
        return True

    def commit(self, tokens: Tokens) -> list[TokenEvent]:
        """Accept the tokens of the oldest step in flight; returns an event for every request that got any.

        Tokens of an older epoch are passed over, and so are rows whose request has ended meanwhile. A row that wanted a
        token, or scores of its prompt, and has none ends its request with an error.
        """
        if tokens.epoch != self.epoch:
            return []
        assert self._flights, f"tokens of step {tokens.step} arrived, but no step is in flight"
        index, rows = self._flights.popleft()
        assert index == tokens.step, f"tokens of step {tokens.step} arrived before those of step {index}"
        assert len(rows) == len(tokens.rows), f"step {index} has {len(rows)} rows, its tokens {len(tokens.rows)}"
        events = []
        for (sequence, slice_), row in zip(rows, tokens.rows, strict=True):
            if sequence.state is State.FINISHED:
                continue
            sequence.in_flight -= 1
            sequence.confirmed = slice_.end
            scored = len(sequence.prompt_targets(slice_) or ()) == len(row.prompt_logprobs)
            if sequence.prompt_logprobs is not None:
                sequence.prompt_logprobs.extend(row.prompt_logprobs)
            last = slice_.end == sequence.known
            if not scored or (last and not row.token_ids):
                events += self.fail([sequence.request.request_id], NO_TOKEN)
            elif last:
                events.append(self._accept(sequence, row))
        return events

    def _accept(self, sequence: Sequence, row: RowTokens) -> TokenEvent:
        accepted, reason = 0, None
        while reason is None and accepted < len(row.token_ids):
            reason = sequence.accept(row.token_ids[accepted])
            accepted += 1
        if reason is not None:
            self._roster.finish(sequence)
        prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, None
        return TokenEvent(
            sequence.request.request_id,
            token_ids=row.token_ids[:accepted],
            logprobs=row.logprobs[:accepted],
            prompt_logprobs=None if prompt_logprobs is None else tuple(prompt_logprobs),
            finish_reason=reason,
        )

    def cancel(self, request_id: int) -> TokenEvent | None:
        """End a request and free its slot and blocks at once; None when it has ended already."""
        sequence = self._roster.live.get(request_id)
        if sequence is None:
            return None
        self._roster.finish(sequence)
        return TokenEvent(request_id, finish_reason="cancelled")

    def fail(self, request_ids: Iterable[int], error: str) -> list[TokenEvent]:
        """End these requests with an error; ids that have ended already are passed over."""
        events = []
        for request_id in request_ids:
            sequence = self._roster.live.get(request_id)
            if sequence is not None:
                self._roster.finish(sequence)
                events.append(TokenEvent(request_id, finish_reason="error", error=error))
        return events

    def fail_all(self, error: str) -> list[TokenEvent]:
        """End every request with an error and forget the steps in flight: their tokens come too late."""
        self._forget_flights()
        return self.fail(list(self._roster.live), error)

    def fail_step(self, index: int, error: str, *, newest_only: bool = False) -> list[TokenEvent]:
        """End the requests of a step in flight that a stage could not finish; the others keep what has come through all
        stages, and go on behind it.

        ``newest_only``: of the step's requests just the newest ends, as is right when there was no room for all.
        """
        rows = next((rows for flight, rows in self._flights if flight == index), [])
        ending = [sequence for sequence, _ in rows]
        if newest_only and ending:
            ending = [max(ending, key=lambda sequence: sequence.arrival)]
        events = self.fail([sequence.request.request_id for sequence in ending], error)
        self.halt()
        return events

    def recompute_all(self) -> None:
        """Begin a new epoch after all stages lost their KV: running sequences are computed again from their tokens.

        Steps in flight are forgotten; no accepted token is lost or reported twice.
        """
        self._forget_flights()
        for sequence in list(self._roster.running):
            self._roster.suspend(sequence)

    def halt(self) -> None:
        """Begin a new epoch after a step or a stage was lost: what has not come through all stages counts as not
        computed."""
        self._forget_flights()
        for sequence in list(self._roster.running):
            self._go_back(sequence, sequence.confirmed)

    def held(self) -> list[Held]:
        """The KV of the running sequences that stages must have before the next step."""
        return [
            Held(
                sequence.request.request_id,
                sequence.slot,
                sequence.confirmed,
                self._roster.tables(sequence),
                sequence.refill_end > sequence.confirmed,
            )
            for sequence in self._roster.running
            if sequence.slot is not None and max(sequence.confirmed, sequence.refill_end) > 0
        ]

    def go_back(self, ends: Mapping[int, int], refill: Iterable[int] = ()) -> None:
        """Compute again what some stage has no KV of: each running sequence from the position in ``ends`` (request id
        -> tokens whose KV every stage has; others: none) or the start of the prompt chunk that holds it.

        ``refill``: the stages that do; empty: all of them.
        """
        assert not self._flights, "sequences go back while steps are in flight"
        self._refill = tuple(sorted(refill))
        for sequence in list(self._roster.running):
            sequence.refill_end = max(sequence.confirmed, sequence.refill_end) if self._refill else 0
            end = min(sequence.confirmed, ends.get(sequence.request.request_id, 0))
            self._go_back(sequence, sequence.slice_start(end, self.limits.chunk_tokens))

    def _go_back(self, sequence: Sequence, position: int) -> None:
        """Nothing is dropped of a window that is wanted again, and no state can go back: then all is computed again."""
        if self._states or not self._roster.accounts.reaches(sequence, position):
            self._roster.suspend(sequence)
        else:
            sequence.go_back(position)

    def _forget_flights(self) -> None:
        self._flights.clear()
        self.epoch += 1

    @property
    def next_commit(self) -> tuple[int, int] | None:
        """Epoch and index of the step whose tokens are committed next; None when none is in flight."""
        return (self.epoch, self._flights[0][0]) if self._flights else None

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._roster.live)

    @property
    def in_flight(self) -> int:
        """Steps scheduled and not yet committed."""
        return len(self._flights)

    def statistics(self) -> Statistics:
        """Counts of the moment."""
        return self._roster.statistics(self.in_flight)

    def check_integrity(self) -> None:
        """Assert that slots and blocks are owned exactly once and every live request is running or waiting."""
        self._roster.check_integrity()
