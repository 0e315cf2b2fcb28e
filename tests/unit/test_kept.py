"""What is kept of stages elsewhere, how it goes back, and how a stage ships it."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from splitrun.engine.kept import KeptKV
from splitrun.engine.restoring import Restoration
from splitrun.engine.shipping import Shipping
from splitrun.planner.facts import KVGroup
from splitrun.schedule.flat import MalformedMessage
from splitrun.schedule.scheduler import Held
from splitrun.schedule.step import Step
from splitrun.stage.batch import BatchRules
from splitrun.stage.blocks import BlockStore
from splitrun.stage.generic import Computed, RangeStage
from splitrun.transport.frames import Frame, Kind
from splitrun.transport.messages import KVRows, kv_frame, kv_of

WIDTH = 3


def rows(start: int, stop: int) -> Tensor:
    """Rows that name their tokens."""
    return torch.arange(start, stop, dtype=torch.float32).view(-1, 1).expand(-1, WIDTH).contiguous()


PIECES = {
    "one after the other": ([(0, 4), (4, 9)], 9),
    "the first was not kept": ([(4, 9)], 0),
    "one between was not kept": ([(0, 4), (8, 9)], 4),
    "computed again": ([(0, 4), (4, 9), (2, 5)], 5),
    "computed again from the start": ([(0, 4), (4, 9), (0, 4)], 4),
}


@pytest.mark.parametrize(("pieces", "tokens"), list(PIECES.values()), ids=list(PIECES))
def test_rows_are_kept_in_order(pieces: list[tuple[int, int]], tokens: int) -> None:
    kept = KeptKV({1: 1 << 20})
    kept.begin([7])
    for start, stop in pieces:
        kept.take(1, 7, start, rows(start, stop))
    assert kept.tokens([1], 7) == tokens
    assert kept.nbytes == tokens * WIDTH * 4
    if tokens:
        assert torch.equal(kept.rows(1, 7, 1, 99), rows(1, tokens))
    kept.forget(7)
    assert (kept.nbytes, kept.tokens([1], 7)) == (0, 0)


def test_limits_and_strangers() -> None:
    kept = KeptKV({1: 5 * WIDTH * 4, 2: 0})
    kept.begin([7])
    kept.take(1, 7, 0, rows(0, 4))
    kept.take(1, 7, 4, rows(4, 6))  # no room for these
    kept.take(1, 8, 0, rows(0, 1))  # ended, or never begun
    kept.take(2, 7, 0, rows(0, 1))
    kept.take(5, 7, 0, rows(0, 1))
    assert (kept.tokens([1], 7), kept.tokens([1], 8), kept.tokens([1, 2], 7)) == (4, 0, 0)
    assert kept.nbytes == 4 * WIDTH * 4


class Restoring:
    """A restoration, what it sent, and how it resumed."""

    def __init__(self, tokens: int = 600, journals: bool = False) -> None:
        self.kept = KeptKV({0: 1 << 20, 2: 1 << 20, 3: 1 << 20})
        self.kept.begin([7])
        for stage in (0, 2):
            self.kept.take(stage, 7, 0, rows(0, tokens))
        self.sent: deque[Frame] = deque()
        self.resumed: list[dict[int, int]] = []
        self.refill: set[int] = set()
        self.restoration = Restoration(self.kept, 9, self.send, self.resume, journals=journals)
        self.told = 0

    def resume(self, ends: Mapping[int, int], refill: Collection[int]) -> None:
        self.resumed.append(dict(ends))
        self.refill = set(refill)

    def lose(self, stages: list[int], held: Held) -> set[int]:
        """Lose stages of which nothing was kept; those that compute again."""
        self.restoration.lose(stages, self.tell)
        self.restoration.begin(self.restoration.losses, [held])
        return self.refill

    def send(self, stage: int, frame: Frame) -> bool:
        assert frame.stage == stage
        self.sent.append(frame)
        return True

    def tell(self) -> None:
        self.told += 1

    def place(self) -> KVRows:
        frame = self.sent.popleft()
        self.restoration.placed(Frame(Kind.RESTORED, 9, frame.stage, step=frame.step))
        return kv_of(frame)


HELD = Held(7, 3, 560, {"full": (4, 5, 6)})


def test_kv_goes_back_piece_by_piece() -> None:
    one = Restoring()
    one.restoration.lose([0], one.tell)
    assert one.told == 1
    one.restoration.begin(1, [HELD])
    assert (len(one.sent), one.resumed, one.restoration.waiting) == (1, [], True)
    first = one.place()
    assert (first.request, first.slot, first.start, first.rows.shape[0]) == (7, 3, 0, 512)
    assert first.tables["full"].tolist() == [4, 5, 6]
    second = one.place()
    assert torch.equal(second.rows, rows(512, 560))
    assert (one.resumed, one.restoration.waiting) == ([{7: 560}], False)


def test_a_request_that_ends_meanwhile_is_passed_over() -> None:
    one = Restoring()
    one.kept.begin([8])
    one.kept.take(0, 8, 0, rows(0, 20))
    one.restoration.lose([0], one.tell)
    one.restoration.begin(1, [HELD, Held(8, 1, 20, {})])
    one.restoration.forget(7)
    assert [one.place().request for _ in range(2)] == [7, 8]
    assert one.resumed == [{7: 560, 8: 20}]


def test_only_what_all_the_lost_stages_have_goes_back() -> None:
    one = Restoring()
    one.kept.take(2, 7, 30, rows(30, 40))
    one.restoration.lose([0], one.tell)
    one.restoration.lose([2], one.tell)  # before the first was given anything
    one.restoration.begin(1, [HELD])  # that one is overtaken
    assert not one.sent
    one.restoration.begin(2, [HELD])
    assert sorted(frame.stage for frame in one.sent) == [0, 2]
    assert [one.place().rows.shape[0] for _ in range(2)] == [40, 40]
    assert one.resumed == [{7: 40}]


def test_another_loss_ends_what_is_under_way() -> None:
    one = Restoring()
    one.restoration.lose([0], one.tell)
    one.restoration.begin(1, [HELD])
    one.restoration.lose([0], one.tell)
    one.place()  # too late
    assert (one.resumed, one.restoration.waiting, len(one.sent)) == ([], False, 0)
    one.restoration.begin(2, [HELD])
    one.place()
    one.place()
    assert one.resumed == [{7: 560}]


@pytest.mark.parametrize(("lost", "ends"), [([1], {7: 560}), ([0], {7: 0})], ids=["no KV there", "nothing kept"])
def test_nothing_to_wait_for(lost: list[int], ends: dict[int, int]) -> None:
    one = Restoring(tokens=0)
    one.restoration.lose(lost, one.tell)
    one.restoration.begin(1, [HELD])
    assert (one.resumed, len(one.sent)) == ([ends], 0)


BUSY = Held(7, 3, 100, {}, refilling=True)
LOSSES = {
    "one": ([([2], HELD)], {2}),
    "without KV": ([([1], HELD)], set()),
    "both": ([([2, 3], HELD)], {2, 3}),
    "one after the other": ([([2], HELD), ([0], HELD)], {0}),
    "the one before came back with nothing to pass on": ([([2], HELD), ([3], HELD)], {2, 3}),
    "and has no KV": ([([1], HELD), ([2], HELD)], {1, 2}),
    "its requests have ended": ([([2], Held(6, 0, 5, {})), ([3], HELD)], {3}),
    "while another computes again": ([([3], HELD), ([0], BUSY)], {0, 3}),
    "the one before it, while it computes again": ([([2], HELD), ([1], BUSY)], {1, 2}),
}


@pytest.mark.parametrize(("losses", "refill"), list(LOSSES.values()), ids=list(LOSSES))
def test_who_computes_again(losses: list[tuple[list[int], Held]], refill: set[int]) -> None:
    """Stage 1 has no KV."""
    one = Restoring(tokens=0, journals=True)
    one.kept.begin([6])
    found = [one.lose(*loss) for loss in losses]
    assert found[-1] == refill
    assert Restoring(tokens=0).lose(*losses[0]) == set()


def test_a_request_that_ends_leaves_nothing() -> None:
    one = Restoring(tokens=0, journals=True)
    one.lose([2], HELD)
    one.restoration.forget(7)
    assert one.lose([3], HELD) == {3}


class TwoGroups(RangeStage):
    """Two layers, each in a group of its own, the second with a window."""

    def __init__(self) -> None:
        full, sliding = KVGroup("full"), KVGroup("sliding", 8)
        caches = tuple(SimpleNamespace(group=group) for group in (full, sliding))
        model: Any = SimpleNamespace(structure=SimpleNamespace(caches=caches), device=torch.device("cpu"))
        stores = {index: BlockStore(6, 4, (2, 3), (2, 5), torch.float32, torch.device("cpu")) for index in range(2)}
        super().__init__(model, stores, BatchRules((full, sliding), 4), 0)

    def compute(self, step: Step, incoming: Tensor | None) -> Computed:
        raise AssertionError("nothing is computed here")


def test_kv_moves_to_other_blocks() -> None:
    there, here = TwoGroups(), TwoGroups()
    for store in there._stores.values():
        store.keys.uniform_()
        store.values.uniform_()
    full, window = (5, 0, 3), (-1, 2, 1)
    exported = there.export({"full": full, "sliding(8)": window}, 2, 11)
    assert exported.shape == (9, there.kv_width)
    here.restore({"full": (1, 2, 0), "sliding(8)": (-1, 5, 0)}, 2, exported)
    for layer, old, new in ((0, full, (1, 2, 0)), (1, window, (-1, 5, 0))):
        for position in range(2, 11):
            before, after = old[position // 4], new[position // 4]
            if before >= 0:
                for pool in ("keys", "values"):
                    wanted = getattr(there._stores[layer], pool)[before, :, position % 4]
                    assert torch.equal(getattr(here._stores[layer], pool)[after, :, position % 4], wanted)
    assert not here._stores[1].keys[1].any()  # nobody's block


@pytest.mark.parametrize(
    ("tables", "width", "fault"),
    [
        ({"full": (1,), "sliding(8)": (1, 2)}, 32, "have no blocks"),
        ({"full": (1, 9), "sliding(8)": (1, 2)}, 32, "is not there"),
        ({"full": (1, 2), "sliding(8)": (1, 2)}, 31, "has 31 values, the stage keeps 32"),
    ],
)
def test_kv_that_does_not_fit_is_refused(tables: dict[str, tuple[int, ...]], width: int, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        TwoGroups().restore(tables, 0, torch.zeros(5, width))


class Ships:
    """A stage whose KV names its tokens, and a line that takes so many frames."""

    def __init__(self) -> None:
        self.room = 1000
        self.sent: list[tuple[int, int, int]] = []
        self.shipping = Shipping(9, {1: self}, self.send)  # type: ignore[dict-item]

    def export(self, tables: Any, start: int, stop: int) -> Tensor:
        return rows(start, stop)

    def send(self, frame: Frame) -> bool:
        kv = kv_of(frame)
        assert torch.equal(kv.rows, rows(kv.start, kv.start + kv.rows.shape[0]))
        if self.room:
            self.room -= 1
            self.sent.append((kv.request, kv.start, kv.start + kv.rows.shape[0]))
            return True
        return False

    def step(self, request: int, context: int, count: int, stage: int = 1) -> list[tuple[int, int, int]]:
        """What is sent behind a step of one row on slot 0."""
        one = numpy.zeros(1, numpy.int32)
        tables = {"full": numpy.zeros((1, 90), numpy.int32)}
        starts, ids = numpy.array([0, count], numpy.int32), numpy.zeros(count, numpy.int32)
        self.sent = []
        step = Step(0, 0, ids, starts, one + context, one, tables, (None,), (None,), None, (False,), (request,))
        self.shipping.after(stage, step)
        return self.sent


def test_kv_goes_off_behind_prompts_and_every_16_tokens() -> None:
    ships = Ships()
    assert ships.step(7, 0, 100) == [(7, 0, 64), (7, 64, 100)]
    assert ships.step(7, 0, 100, stage=0) == []
    assert [len(ships.step(7, context, 1)) for context in range(100, 111)] == [0] * 11
    assert ships.step(7, 111, 1) == [(7, 100, 112)]
    assert ships.step(7, 112, 16) == [(7, 112, 128)]
    assert ships.step(7, 64, 32) == [(7, 64, 96)]  # computed again
    assert ships.step(8, 0, 20) == [(8, 0, 20)]  # another one's slot


def test_what_the_line_does_not_take_goes_later() -> None:
    ships = Ships()
    ships.room = 1
    assert ships.step(7, 0, 100) == [(7, 0, 64)]
    ships.room = 9
    assert ships.step(7, 100, 12) == [(7, 64, 112)]


def test_what_came_from_the_coordinator_does_not_go_there_again() -> None:
    ships = Ships()
    ships.shipping.restored(1, 0, 7, 112)
    assert ships.step(7, 112, 16) == [(7, 112, 128)]


@pytest.mark.parametrize("change", [{"start": -1}, {"slot": "x"}, {"tables": {"full": 5}}, {"request": None}])
def test_frames_that_hold_no_kv_are_malformed(change: dict[str, Any]) -> None:
    frame = kv_frame(9, 1, 0, 4, KVRows(7, 0, rows(0, 2), 0, {"full": numpy.arange(3, dtype=numpy.int32)}))
    assert kv_of(frame).tables["full"].tolist() == [0, 1, 2]
    broken = Frame(Kind.KV, 9, 1, 0, 0, 4, {**frame.control, **change}, frame.integers, (), frame.body)
    with pytest.raises(MalformedMessage):
        kv_of(broken)


def test_a_frame_without_rows_is_malformed() -> None:
    with pytest.raises(MalformedMessage):
        kv_of(Frame(Kind.KV, 9, 1, control={"request": 7, "start": 0, "slot": 0, "tables": {}}))
