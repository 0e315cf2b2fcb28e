"""Measured seconds: lines between points, units apart from their stage, and the steps that are timed."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from planner_models import MIB, device, model
from tiny_models import ARCHITECTURES, COMMON
from torch import Tensor
from transformers import AutoConfig

from splitrun.measure import timing, unit_seconds
from splitrun.measure.cache import Cache
from splitrun.measure.lines import at_most, less, most_beside, slope
from splitrun.measure.lines import unit_seconds as lines_of
from splitrun.measure.profile import profile
from splitrun.measure.timing import Sample, Setting, UnitBench, copies_needed, last_cache_bytes, sample
from splitrun.measure.unit_seconds import MANY_THREADS, Wanted, for_every_step, in_a_row, layer_shape, measure
from splitrun.measure.unit_steps import Point, make_step, pool_blocks
from splitrun.model.cut import CutRange
from splitrun.model.files import ModelFiles
from splitrun.model.structure import inspect
from splitrun.planner.cost import decode_s, prefill_s, stage_s
from splitrun.planner.facts import Cluster, KVGroup, Workload
from splitrun.planner.placement import ModelRef, Placement, StageSpec
from splitrun.planner.seconds import DOUBLING, DecodeLine, DeviceSeconds, UnitSeconds, filled, interpolated
from splitrun.schedule.step import Step


@pytest.mark.parametrize(
    ("points", "position", "expected"),
    [
        ([(1, 2.0)], 5, 2.0),
        ([(1, 2.0), (3, 4.0)], 2, 3.0),
        ([(1, 2.0), (3, 4.0)], 0, 2.0),  # before the first point no smaller
        ([(1, 2.0), (3, 4.0)], 5, 6.0),
        ([(1, 2.0), (3, 4.0), (5, 4.0)], 9, 4.0),
        ([(1, 4.0), (3, 2.0)], 9, 0.0),  # never negative
    ],
)
def test_between_points(points: list[tuple[float, float]], position: float, expected: float) -> None:
    assert interpolated(points, position) == pytest.approx(expected)


UNIT = UnitSeconds((DecodeLine(1, 1e-3, 1e-6), DecodeLine(4, 2e-3, 4e-6)), ((32, 3e-3), (512, 30e-3)), 1e-8, 0.1)


def test_a_unit_follows_its_lines() -> None:
    assert UNIT.decode_s(1, 1000) == pytest.approx(2e-3)
    assert UNIT.decode_s(4, 500) == pytest.approx(4e-3)
    assert UNIT.prefill_s(32) == pytest.approx(3e-3)
    assert UNIT.prefill_s(272) == pytest.approx(16.5e-3)
    assert UNIT.prefill_s(512, 1000) == pytest.approx(30e-3 + 5.12e-3)


@pytest.mark.parametrize(
    ("step", "tokens", "computed"),
    [
        (1, 104, 104),
        (16, 104, 112),
        (16, 112, 112),
        (16, 1, 1),
        (16, 2, 16),
        (DOUBLING, 104, 128),
        (DOUBLING, 128, 128),
        (DOUBLING, 1, 1),
        (DOUBLING, 5, 32),
        (DOUBLING, 129, 256),
    ],
)
def test_a_chunk_takes_what_it_is_filled_to(step: int, tokens: int, computed: int) -> None:
    unit = replace(UNIT, prefill=((1, 1e-3), (4096, 4.096)), chunk_history_s=0.0, chunk_step=step)
    assert unit.prefill_s(tokens) == pytest.approx(computed * 1e-3)


def test_what_was_measured_goes_before_bandwidths() -> None:
    place, workload = device(), Workload(context=1024, chunk_tokens=512)
    stage = UnitSeconds((DecodeLine(1, 5e-4, 0.0),), ((512, 1e-3),))
    facts = replace(model(layers=2), seconds={("cpu", "bf16"): DeviceSeconds(stage, (UNIT,) * 4)})
    assert decode_s(facts, 1, place, "bf16", workload, "bf16") == pytest.approx(UNIT.decode_s(1, 512))
    assert decode_s(facts, 1, place, "nf4", workload, "bf16") != pytest.approx(UNIT.decode_s(1, 512))
    longer = replace(workload, prompt_tokens=600, history_tokens=7)
    assert prefill_s(facts, 1, place, "bf16", longer, "bf16") == pytest.approx(
        UNIT.prefill_s(512) + UNIT.prefill_s(88, 512)
    )
    spec = StageSpec("cpu", True, (0, 2), True, "bf16")
    plan = Placement(1, ModelRef("x", layers=2), longer, (spec,))
    expected = 5e-4 + 4 * UNIT.decode_s(1, 7)
    assert stage_s(facts, Cluster((place,)), plan, spec, prefill=False) == pytest.approx(expected)


def test_units_are_what_is_left_of_a_stage() -> None:
    near, far, chunk, behind = Point(1, 1, 100), Point(1, 1, 1100), Point(1, 32, 0), Point(1, 32, 64)
    stage = {point: Sample(1e-3, 0.5) for point in (near, far, chunk, behind)}
    seconds = {near: 5e-3, far: 7e-3, chunk: 9e-3, behind: 13e-3}
    found = {point: Sample(value, 0.1) for point, value in seconds.items()}
    unit = lines_of(less(found, stage), [near, far, chunk, behind])
    (line,) = unit.decode
    assert (line.per_token_s, line.fixed_s) == (pytest.approx(2e-6), pytest.approx(4e-3 - 2e-4))
    assert unit.prefill == ((32, pytest.approx(8e-3)),)
    assert unit.chunk_history_s == pytest.approx(4e-3 / (32 * 64))
    assert unit.spread == 0.1


@pytest.mark.parametrize("step", [1, 16, DOUBLING])
def test_the_longest_chunk_of_a_small_model_stands_for_what_it_is_filled_to(step: int) -> None:
    """It ends where the model's context does: a line through 129 tokens that took as long as 256 would be steep."""
    seconds = {129: filled(129, step) * 1e-3, 128: 0.128, 64: 0.064, 32: 0.032}
    points = [Point(1, 1, 32), *(Point(1, tokens, 0) for tokens in sorted(seconds)), Point(1, 129, 1)]
    samples = {point: Sample(seconds.get(point.tokens, 1e-3) + 1e-5 * point.context, 0.1) for point in points}
    unit = lines_of(samples, points, step)
    for tokens in (32, 100, 129):
        assert unit.prefill_s(tokens) == pytest.approx(filled(tokens, step) * 1e-3)
    assert unit.chunk_history_s == pytest.approx(1e-5 / 129)


@pytest.mark.parametrize(
    ("several", "one", "expected"),
    [
        (7e-3, 3e-3, 2e-3),
        (7e-3, 8e-3, 0.0),  # a disturbed run of one layer
        (7e-3, 0.5e-3, 7e-3 / 3),  # at most an equal share
    ],
)
def test_a_layer_is_what_two_more_take_more_than_one(several: float, one: float, expected: float) -> None:
    point = Point(1, 1, 100)
    found = slope({point: Sample(several, 0.1)}, {point: Sample(one, 0.3)}, 3)
    assert found[point] == Sample(pytest.approx(expected), 0.1)


def test_a_layer_takes_most_of_what_several_take() -> None:
    point = Point(1, 1, 100)
    most = most_beside({point: Sample(0.5e-3, 0.1)}, on_processor=True)
    found = slope({point: Sample(13e-3, 0.1)}, {point: Sample(10e-3, 0.3)}, 2, most)  # the one was disturbed
    assert found[point].seconds == pytest.approx(6e-3)
    assert at_most({point: Sample(4e-3, 0.3)}, most)[point].seconds == pytest.approx(1e-3)
    assert at_most({point: Sample(0.7e-3, 0.3)}, most)[point].seconds == pytest.approx(0.7e-3)


def test_a_chunk_on_a_processor_may_take_longer_to_prepare() -> None:
    embed = {Point(1, 1, 100): Sample(1e-3, 0.1), Point(1, 32, 0): Sample(1e-3, 0.1)}
    assert list(most_beside(embed, on_processor=True).values()) == [2e-3, 6e-3]
    assert list(most_beside(embed, on_processor=False).values()) == [2e-3, 2e-3]


@pytest.mark.parametrize(
    ("count", "kind", "threads", "kept"),
    [(1, "cpu", 2, 4), (4, "cpu", 2, 2), (4, "cpu", MANY_THREADS, 3), (4, "cuda", None, 4)],
)
def test_what_is_timed_on_layers_in_a_row(count: int, kind: str, threads: int | None, kept: int) -> None:
    points = [Point(1, 1, 128), Point(1, 32, 0), Point(1, 128, 0), Point(1, 512, 1024)]
    assert in_a_row(points, count, kind, threads) == points[:kept]


def test_a_stage_takes_for_any_chunk_what_it_does_for_the_longest_in_a_row() -> None:
    token, short, long, behind = Point(1, 1, 128), Point(1, 32, 0), Point(1, 512, 0), Point(1, 512, 1024)
    rest = {token: Sample(1e-4, 0.1), short: Sample(7e-4, 0.1)}
    assert for_every_step(rest, [token, short, long, behind]) == rest | dict.fromkeys((long, behind), rest[short])
    rest |= {long: Sample(9e-4, 0.1)}
    assert for_every_step(rest, [token, short, long, behind]) == rest | {behind: rest[long]}


def test_a_step_reads_and_writes_within_its_blocks() -> None:
    point = Point(rows=3, tokens=5, context=70)
    blocks = pool_blocks([point, Point(1, 1, 10)], 16)
    step = make_step(point, [KVGroup("full"), KVGroup("state")], 16, blocks)
    assert blocks == 3 * 5
    assert step.counts.tolist() == [5, 5, 5]
    assert step.block_tables["full"].shape == (3, 5)
    assert sorted(step.block_tables["full"].reshape(-1).tolist()) == list(range(15))
    assert make_step(point, [KVGroup("full")], 16, 4).block_tables["full"].max() == 3


def test_copies_fill_more_than_the_cache(tmp_path: Path) -> None:
    assert last_cache_bytes(tmp_path) == 0
    for index, text in enumerate(("48K", "32M", "odd")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(text)
    assert last_cache_bytes(tmp_path) == 32 << 20
    assert copies_needed(1 << 30, "cuda") == 1
    assert copies_needed(40 << 20, "cuda") == 3
    assert copies_needed(1, "cpu") == 12


def test_copies_are_no_more_than_the_model_where_that_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "last_cache_bytes", lambda: 400 << 20)
    assert copies_needed(100 << 20, "cpu") == 8
    assert copies_needed(100 << 20, "cpu", model_bytes=300 << 20) == 3
    assert copies_needed(10 << 20, "cpu", model_bytes=20 << 20) == 10  # what others read is in the caches too


def test_a_card_with_a_large_cache_gets_more_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "card_cache_bytes", lambda kind, device: 60 << 20 if device == "cuda:1" else 0)
    assert copies_needed(40 << 20, "cuda", "cuda:0") == 3
    assert copies_needed(40 << 20, "cuda", "cuda:1") == 6
    assert copies_needed(25 << 20, "cuda", "cuda:1") == 10


def test_a_sample_is_a_median_and_its_spread() -> None:
    calls: list[str] = []
    found = sample(calls.append, ["a", "b"], spend_s=0.0)
    assert calls == ["a", "b", "a"]
    assert found.seconds > 0
    assert found.spread >= 0


def tiny(name: str = "llama", **changes: Any) -> Any:
    kind, more = ARCHITECTURES[name]
    import transformers

    return getattr(transformers, kind)(**{**COMMON, **more, **changes})


POINTS = [Point(1, 1, 4), Point(2, 1, 20), Point(1, 8, 0), Point(1, 8, 8)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen2_moe", "mamba"])
@pytest.mark.parametrize("weights", ["bf16", "nf4"])
def test_every_kind_of_unit_can_be_timed(name: str, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "POINT_SECONDS", 0.0)
    config = tiny(name)
    structure = inspect(config)
    setting = Setting("cpu", "cpu", "bf16", weights, 16)
    n = structure.layers
    for cut in (CutRange(True, 0, 0, False), CutRange(False, 0, 1, False), CutRange(False, n, n, True)):
        bench = UnitBench(config, structure, cut, setting, POINTS)
        found = bench.time(POINTS)
        bench.close()
        assert set(found) == set(POINTS)
        assert all(each.seconds > 0 for each in found.values())


class Keeping:
    """A stage whose KV comes when it is first written, and that keeps a buffer as large as its longest step so far."""

    chunk_step = 1

    def __init__(self, held: list[int]) -> None:
        self.model = SimpleNamespace(cut=CutRange(True, 0, 0, False))
        self._held, self._longest, self._kv = held, 0, 5 * MIB

    def clear_kv(self) -> None:
        self._held[0] += self._kv
        self._kv = 0

    def run(self, step: Step, incoming: Tensor | None) -> None:
        self.clear_kv()
        longest = int((step.context_lengths + step.query_starts[1:] - step.query_starts[:-1]).max()) * MIB
        self._held[0] += max(0, longest - self._longest)
        self._longest = max(longest, self._longest)

    def close(self) -> None:
        pass


def test_temporary_bytes_are_those_of_one_stage_and_of_no_longer_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither KV nor what the other copies keep counts, in whatever order points are named."""
    held = [0]
    monkeypatch.setattr(timing, "POINT_SECONDS", 0.0)
    monkeypatch.setattr(timing, "load_stage", lambda *arguments: Keeping(held))
    monkeypatch.setattr(timing, "held_bytes", lambda kind, device: held[0])
    monkeypatch.setattr(timing, "peak_of", lambda run, kind, device, before: (run(), held[0] - before)[1])
    points = [Point(1, 1, 99), Point(1, 1, 7), Point(2, 1, 7), Point(1, 32, 0)]
    setting = Setting("cpu", "cpu", "bf16", "bf16", 16, copies=4)
    bench = UnitBench(None, inspect(tiny()), CutRange(True, 0, 0, False), setting, points)
    found = bench.time(points)
    bench.close()
    assert [found[point].peak_bytes // MIB for point in points] == [100, 8, 8, 32]


@pytest.fixture
def settled() -> list[tuple[bool, int | None]]:
    """Of every bench, whether it settles on a number of threads, and which was told to it."""
    return []


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, settled: list[tuple[bool, int | None]]) -> list[tuple[CutRange, str, int]]:
    """What is timed, without a clock: a stage takes 1 ms, the embedding 0.5 ms more, a layer and the head 2 ms."""
    calls: list[tuple[CutRange, str, int]] = []

    class Watch:
        load_bytes, chunk_step = 7, 16

        def __init__(self, config: Any, structure: Any, cut: CutRange, setting: Setting, points: Any) -> None:
            calls.append((cut, setting.weights, len(points)))
            self.fast = (setting.fast or 3) if setting.settles else None
            settled.append((setting.settles, setting.fast))
            self.seconds = 1e-3 + 0.5e-3 * cut.embed + 2e-3 * (cut.stop - cut.start) + 2e-3 * cut.head

        def time(self, points: Any) -> Any:
            return {point: Sample(self.seconds, 0.05, 100 * point.tokens) for point in points}

        def close(self) -> None:
            pass

    monkeypatch.setattr(unit_seconds, "UnitBench", Watch)
    return calls


def measured(folder: Path, formats: tuple[str, ...] = ("nf4",), rows: tuple[int, ...] = (1,), **more: Any) -> Any:
    config = tiny(num_hidden_layers=4)
    files = ModelFiles("tiny", None, folder, config, weights=False)
    structure = inspect(config)
    files.__dict__["fingerprint"] = "sha256:0"
    facts = profile(files, structure)
    cluster = Cluster((device(budget=more.pop("budget", 64 * MIB)),))
    wanted = Wanted({"cpu": formats}, rows, 16, more.pop("threads", {}))
    kept = Cache(folder, **more)
    return measure(files, structure, facts, cluster, wanted, kept, open_bench=unit_seconds.UnitBench)


def test_each_shape_is_timed_once_and_kept(tmp_path: Path, asked: list[tuple[CutRange, str, int]]) -> None:
    found = measured(tmp_path).seconds["cpu", "nf4"]
    assert [cut for cut, _, _ in asked] == [
        CutRange(True, 0, 0, False), CutRange(False, 0, 4, False),
        CutRange(False, 0, 1, False), CutRange(False, 4, 4, True),
    ]  # fmt: skip
    assert [weights for _, weights, _ in asked] == ["bf16", "nf4", "nf4", "nf4"]
    assert [unit.decode_s(1, 9) for unit in found.units] == pytest.approx([0.5e-3, *[2e-3] * 5])
    assert found.stage.decode_s(1, 9) == pytest.approx(1e-3)
    kept = measured(tmp_path).seconds["cpu", "nf4"]
    assert len(asked) == 4  # from the cache
    assert {unit.chunk_step for one in (found, kept) for unit in (one.stage, *one.units)} == {16}
    measured(tmp_path, rows=(1, 4))
    assert [points for _, _, points in asked[4:]] == [2] * 4  # the further rows alone
    measured(tmp_path, refresh=True)
    assert len(asked) == 12


def test_threads_are_settled_once_for_all_units(
    tmp_path: Path, asked: list[tuple[CutRange, str, int]], settled: list[tuple[bool, int | None]]
) -> None:
    measured(tmp_path)
    assert settled == [(False, None), (True, None), (True, 3), (True, 3)]
    measured(tmp_path, rows=(1, 4))  # now from the cache
    assert settled[4:] == [(False, None), (True, 3), (True, 3), (True, 3)]


def test_long_prompts_take_turns_on_two_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[int, int]] = []

    class Noting(Keeping):
        def __init__(self, number: int) -> None:
            super().__init__([0])
            self.number = number

        def run(self, step: Step, incoming: Any) -> None:
            ran.append((self.number, int(step.counts[0])))

    stages = iter(range(4))
    monkeypatch.setattr(timing, "load_stage", lambda *arguments: Noting(next(stages)))
    points = [Point(1, 1, 7), Point(1, 256, 0)]
    setting = Setting("cpu", "cpu", "bf16", "bf16", 16, copies=4)
    bench = UnitBench(None, inspect(tiny()), CutRange(True, 0, 0, False), setting, points)
    bench.time(points, 0.0, peaks=False)
    bench.close()
    assert {number for number, tokens in ran if tokens == 1} == {0, 1, 2, 3}
    assert {number for number, tokens in ran if tokens == 256} == {0, 1}


def test_what_does_not_fit_or_fails_is_left_to_bandwidths(
    tmp_path: Path, asked: list[tuple[CutRange, str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measured(tmp_path, budget=1).seconds == {}

    class TritonError(Exception):
        """Triton's own kind, without Triton."""

    monkeypatch.setitem(sys.modules, "triton.errors", SimpleNamespace(TritonError=TritonError))
    for error in (RuntimeError("no kernel for this card"), TritonError("out of resource: shared memory")):

        def fails(*arguments: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(unit_seconds, "UnitBench", fails)
        assert measured(tmp_path).seconds == {}


def test_equal_layers_have_one_shape() -> None:
    structure = inspect(tiny("gemma2", num_hidden_layers=4))
    shapes = [layer_shape(structure, index) for index in range(4)]
    assert shapes[0] == shapes[2] != shapes[1] == shapes[3]  # sliding and full attention in turn


def test_the_last_row_of_a_prompt_reaches_the_head_as_a_tensor_of_its_own(tmp_path: Path) -> None:
    from splitrun.model.cut import CutModel
    from splitrun.model.dummy import DummySource
    from splitrun.model.weights import Loader

    config = AutoConfig.for_model("llama", **COMMON)
    structure = inspect(config)
    whole = CutModel(config, structure, CutRange(True, 0, 2, True), "fp32", "cpu")
    Loader(whole.skeleton.model, DummySource.of(whole.skeleton.model), torch.float32).load(
        whole.own_names, "fp32", "cpu"
    )
    whole.finish_loading()
    strides = []
    whole.skeleton.model.get_output_embeddings().register_forward_pre_hook(
        lambda module, arguments: strides.append(arguments[0].stride())
    )
    ids = torch.ones((1, 5), dtype=torch.long)
    from transformers import DynamicCache

    with torch.inference_mode():
        logits = whole.forward(ids, torch.arange(5)[None], None, 0, DynamicCache(config=config), None, 1)
    assert logits.shape == (1, 1, COMMON["vocab_size"])
    assert strides == [(COMMON["hidden_size"], COMMON["hidden_size"], 1)]


def test_a_placement_s_threads_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int | None] = []

    def note(config: Any, structure: Any, cut: CutRange, setting: Setting, points: Any) -> Any:
        seen.append(setting.threads)
        raise RuntimeError("seen")

    monkeypatch.setattr(unit_seconds, "UnitBench", note)
    monkeypatch.setattr(unit_seconds, "worker_threads", lambda workers: 8 // workers)
    measured(tmp_path)
    measured(tmp_path, threads={"cpu": 3})
    assert seen == [8, 3]  # of the embedding, behind which it ends


def test_another_budget_times_nothing_again(tmp_path: Path, asked: list[tuple[CutRange, str, int]]) -> None:
    """Unless fewer copies of a layer have room, which are found in a cache then."""
    for budget, timed in ((64, True), (2048, False), (96, False)):
        before = len(asked)
        measured(tmp_path, budget=budget * MIB)
        assert (len(asked) > before) == timed
    before = len(asked)
    measured(tmp_path, budget=MIB // 4)
    assert len(asked) > before
