"""What the solver says when it chooses, leaves out or refuses, on cases made by hand."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from planner_models import GIB, MIB, device, formats_of, model, unit

from splitrun.errors import DoesNotFit, InvalidPlacement
from splitrun.planner.cost import score
from splitrun.planner.facts import Cluster, Workload
from splitrun.planner.formats import allowed_formats
from splitrun.planner.memory import placement_memory
from splitrun.planner.placement import Placement
from splitrun.planner.quality import loss_limit, placement_loss
from splitrun.planner.seconds import DecodeLine, DeviceSeconds, UnitSeconds
from splitrun.planner.solve import solve


def test_a_small_card_takes_what_fits_and_the_cpu_the_rest() -> None:
    profile = model(layers=8, values=100 * MIB)
    card = device("cuda:0", budget=GIB, bandwidth=300e9)
    placement = solve(profile, Cluster((device(), card)), Workload(), "bf16")
    assert set(placement.device_names) == {"cpu", "cuda:0"}
    estimate = placement.estimate
    assert estimate is not None
    assert re.search(r"memory of cuda:0: .* more there would give [\d.]+ instead of [\d.]+ tok/s", estimate.limit)
    assert placement.devices == {"cpu": 8 * GIB, "cuda:0": GIB}
    assert all(stage.kv.dtype == "bf16" for stage in placement.stages)


def test_a_slow_device_is_left_out_with_the_number() -> None:
    cluster = Cluster((device(), device("cpu:1", bandwidth=1e9)))
    placement = solve(model(), cluster, Workload())
    assert placement.device_names == ("cpu",)
    assert placement.estimate is not None
    assert placement.estimate.limit == "speed of cpu; more memory would not help"
    assert placement.estimate.notes[0].startswith("cpu:1 was left out; the best plan with it: ")


def test_a_device_too_small_for_one_unit_is_left_out() -> None:
    cluster = Cluster((device(), device("cuda:0", budget=10 * MIB)))
    placement = solve(model(), cluster, Workload())
    assert placement.estimate is not None
    assert "cuda:0 was left out: no plan that uses it keeps the budgets" in placement.estimate.notes


def test_an_integrated_gpu_and_the_cpu_share_one_memory() -> None:
    profile = model(layers=8, values=100 * MIB)  # 2 GB of weights in bf16
    devices = (
        device(budget=1200 * MIB, memory_pool="host"),
        device("cuda:0", budget=1200 * MIB, bandwidth=60e9, memory_pool="host", context_bytes=0),
    )
    apart = tuple(replace(place, memory_pool=place.name) for place in devices)
    assert solve(profile, Cluster(apart), Workload(), "bf16").device_names
    with pytest.raises(DoesNotFit) as refusal:
        solve(profile, Cluster(devices), Workload(), "bf16")
    assert sum(refusal.value.shortfall_bytes.values()) > 700 * MIB
    assert solve(profile, Cluster(devices), Workload(), quality="int8").stages[0].weights == "int8"


def test_auto_takes_the_fastest_format_within_the_quality() -> None:
    cluster = Cluster((device(budget=200 * MIB),))
    profile, workload = model(layers=8, values=10 * MIB), Workload(context=512)
    formats = {}
    for quality in ("nf4", "int8", "0.5"):
        placement = solve(profile, cluster, workload, quality=quality)
        assert placement.estimate is not None
        formats[quality] = ([stage.weights for stage in placement.stages], placement.estimate.notes[-1])
    assert formats["nf4"] == (
        ["nf4"],
        "all weights are nf4; --quality, such as int8, keeps more of their precision",
    )
    assert formats["int8"] == (
        ["int8"],
        "weights lose 9% of what nf4 throughout loses; --quality, such as bf16, keeps more of their precision",
    )
    assert formats["0.5"][0] == ["nf4", "int8", "nf4"]  # the ends, which are a fifth of the weights
    with pytest.raises(DoesNotFit, match=r"no plan within --quality bf16 fits; .* allow that with --quality 1.00"):
        solve(profile, cluster, workload, quality="bf16")


def test_formats_may_differ_between_devices() -> None:
    card = device("cuda:0", budget=150 * MIB, bandwidth=300e9, context_bytes=0)
    cluster = Cluster((device(budget=GIB), card))
    placement = solve(model(layers=8, values=40 * MIB), cluster, Workload(context=512), quality="0.5")
    found = {stage.device: stage.weights for stage in placement.stages if stage.layers[0] < stage.layers[1]}
    assert found == {"cpu": "int8", "cuda:0": "nf4"}


def test_formats_may_differ_between_stages_of_one_device() -> None:
    """Within 0.9 of what nf4 loses all but an end may be nf4; in one format for the device nothing could."""
    profile = model(layers=8, values=40 * MIB)
    cluster = Cluster((device(),))
    placement = solve(profile, cluster, Workload(context=512), quality="0.9")
    embed, rest = placement.stages
    assert (embed.units_text, rest.units_text, rest.weights) == ("embed", "layers 0–7 + head", "nf4")
    assert embed.weights != "nf4"
    assert placement.estimate is not None
    bills = placement_memory(profile, cluster, placement)
    sizes = profile.units[0].weight_bytes[embed.weights], 9 * profile.units[1].weight_bytes["nf4"]
    assert bills[0].weight_bytes == sum(sizes)
    assert placement_loss(profile, placement) <= loss_limit(profile, "0.9")
    assert score(profile, cluster, placement) == pytest.approx(placement.estimate.step_s)


def test_int8_keys_and_values_where_a_device_asks_for_them() -> None:
    """Their bytes are counted, and a card beside it keeps its own type."""
    profile = model(layers=8, values=20 * MIB, kv=16384)
    profile = replace(profile, units=tuple(replace(unit, kv_heads=16) for unit in profile.units))
    for kept, token_bytes in ((None, 16384 * 2), ("int8", 16384 + 16 * 4)):
        cluster = Cluster((device(kv_dtype=kept),))
        placement = solve(profile, cluster, Workload(), "bf16")
        assert placement.stages[0].kv.dtype == (kept or "bf16")
        assert placement_memory(profile, cluster, placement)[0].kv_bytes == 8 * token_bytes * 4096
    cluster = Cluster((device(kv_dtype="int8"), device("cuda:0", budget=2 * GIB, bandwidth=300e9)))
    stages = solve(profile, cluster, Workload(), "bf16").stages
    assert {(stage.device, stage.kv.dtype) for stage in stages} == {("cpu", "int8"), ("cuda:0", "bf16")}


@pytest.mark.parametrize("quality", ["", "best", "1.5", "-1", "nan"])
def test_qualities_refused(quality: str) -> None:
    with pytest.raises(InvalidPlacement, match="is neither a weight format"):
        solve(model(), Cluster((device(),)), Workload(), quality=quality)


def test_on_one_device_the_runner_up_has_another_format() -> None:
    for budget, named in ((GIB, "int8, not nf4"), (100 * MIB, "")):
        placement = solve(model(layers=8, values=10 * MIB), Cluster((device(budget=budget),)), Workload(context=512))
        assert placement.estimate is not None
        notes = [note for note in placement.estimate.notes if "runner-up" in note]
        assert [f"the runner-up has weights in {named}: " in note for note in notes] == [True] * bool(named)
        if named:
            other = solve(
                model(layers=8, values=10 * MIB), Cluster((device(budget=budget),)), Workload(context=512), "int8"
            )
            assert other.estimate is not None
            assert f" {other.estimate.decode_tokens_per_s:.0f} instead of " in notes[0]
    (fixed,) = solve(model(), Cluster((device(),)), Workload(), "int8").estimate.notes or ("",)  # type: ignore[union-attr]
    assert "runner-up" not in fixed


def test_the_runner_up_and_a_shorter_context_come_with_numbers() -> None:
    profile = model(layers=8, values=100 * MIB, kv=8192)
    cluster = Cluster((device(), device("cuda:0", budget=GIB, bandwidth=300e9)))
    placement = solve(profile, cluster, Workload(), "bf16")
    assert placement.estimate is not None
    notes = " | ".join(placement.estimate.notes)
    assert "the best plan without cuda:0: " in notes
    assert "--context 1024 instead of 4096 would leave room for more on the faster device: " in notes


@pytest.mark.parametrize(
    ("stored", "weights", "expected"),
    [
        ("fp32", "auto", ("fp32", "bf16", "fp16", "int8", "nf4")),
        ("bf16", "auto", ("bf16", "fp16", "int8", "nf4")),
        ("fp16", "auto", ("fp16", "int8", "nf4")),
        ("nf4", "auto", ("nf4",)),
        ("int8", "auto", ("int8",)),
        ("bf16", "fp32", ("fp32",)),  # asked for by name: exact comparison in float32
        ("bf16", "nf4", ("nf4",)),
        ("int8", "int8", ("int8",)),
    ],
)
def test_formats_to_try(stored: str, weights: str, expected: tuple[str, ...]) -> None:
    assert allowed_formats(model(stored_format=stored), weights) == expected


@pytest.mark.parametrize(
    ("stored", "weights", "why"),
    [
        ("nf4", "bf16", "stored as nf4 and cannot be loaded as bf16; use --weights with nf4"),
        ("int8", "nf4", "stored as int8 and cannot be loaded as nf4"),
        ("bf16", "fp8", "'fp8' is not a format; use --weights auto, or one of fp32, bf16"),
    ],
)
def test_formats_refused(stored: str, weights: str, why: str) -> None:
    with pytest.raises(InvalidPlacement, match=why):
        solve(model(stored_format=stored), Cluster((device(),)), Workload(), weights)


def test_a_format_that_one_device_lacks_goes_to_the_other() -> None:
    old_card = device("cuda:0", bandwidth=300e9, formats=("fp32", "fp16"))
    placement = solve(model(), Cluster((device(), old_card)), Workload(), "nf4")
    assert placement.device_names == ("cpu",)
    assert placement.estimate is not None
    assert "cuda:0 was left out: it does not compute nf4" in placement.estimate.notes
    with pytest.raises(DoesNotFit, match="no device computes nf4"):
        solve(model(), Cluster((old_card,)), Workload(), "nf4")


def refusal_of(budget_mib: int, workload: Workload, weights: str = "auto", layers: int = 8) -> DoesNotFit:
    profile = model(layers=layers, values=10 * MIB)
    with pytest.raises(DoesNotFit) as refusal:
        solve(profile, Cluster((device(budget=budget_mib * MIB),)), workload, weights)
    return refusal.value


def advice_of(refusal: DoesNotFit) -> list[str]:
    return str(refusal).split("it fits with ")[1].split(" or ")


def solved_with(advice: str, budget_mib: int, workload: Workload, weights: str) -> Placement:
    words = advice.split()
    options = dict(zip(words[::2], words[1::2], strict=True))
    workload = replace(
        workload,
        context=int(options.get("--context", workload.context)),
        sessions=int(options.get("--sessions", workload.sessions)),
    )
    cluster = Cluster((device(budget=budget_mib * MIB),))
    return solve(model(layers=8, values=10 * MIB), cluster, workload, options.get("--weights", weights))


@pytest.mark.parametrize(
    ("budget_mib", "workload", "weights", "kinds"),
    [
        (150, Workload(context=512), "bf16", ["--weights"]),
        (260, Workload(context=8192), "bf16", ["--weights", "--context"]),
        (260, Workload(context=8192, sessions=4), "int8", ["--context", "--sessions"]),
        (110, Workload(context=8192, sessions=8), "bf16", ["--weights"]),
    ],
)
def test_every_piece_of_advice_fits(budget_mib: int, workload: Workload, weights: str, kinds: list[str]) -> None:
    refusal = refusal_of(budget_mib, workload, weights)
    assert "\n" not in str(refusal)
    assert refusal.shortfall_bytes["cpu"] > 0
    advice = advice_of(refusal)
    assert [piece.split()[0] for piece in advice] == kinds
    for piece in advice:
        solved_with(piece, budget_mib, workload, weights)


def test_the_context_advised_is_the_longest_that_fits() -> None:
    workload = Workload(context=8192)
    (context,) = [piece for piece in advice_of(refusal_of(100, workload, "nf4")) if "--context" in piece]
    longest = int(context.split()[1])
    solved_with(f"--context {longest}", 100, workload, "nf4")
    with pytest.raises(DoesNotFit):
        solved_with(f"--context {longest + workload.block_tokens}", 100, workload, "nf4")


def test_the_shortfall_is_what_is_missing() -> None:
    refusal = refusal_of(60, Workload(context=512))
    assert re.search(r"nothing smaller fits either: in nf4 64 tokens are [\d.]+ MiB short", str(refusal))
    missing = refusal.shortfall_bytes["cpu"]
    profile, workload = model(layers=8, values=10 * MIB), Workload(context=512)
    solve(profile, Cluster((device(budget=60 * MIB + missing),)), workload)
    with pytest.raises(DoesNotFit):
        solve(profile, Cluster((device(budget=60 * MIB + missing - 1),)), workload)


def test_the_shortfall_names_every_device() -> None:
    profile = model(layers=8, values=100 * MIB)
    cluster = Cluster((device(budget=100 * MIB), device("cuda:0", budget=300 * MIB)))
    with pytest.raises(DoesNotFit) as refusal:
        solve(profile, cluster, Workload())
    assert set(refusal.value.shortfall_bytes) == {"cpu", "cuda:0"}


@pytest.mark.parametrize(
    ("devices", "workload", "why"),
    [
        (0, Workload(), "no device to plan for"),
        (1, Workload(context=65536), "longer than the 32768 tokens .* use --context 32768 or less"),
        (1, Workload(sessions=0), "sessions 0 is not allowed"),
        (1, Workload(context=0), "context 0 is not allowed"),
    ],
)
def test_impossible_requests(devices: int, workload: Workload, why: str) -> None:
    cluster = Cluster(tuple(device(f"cuda:{index}") for index in range(devices)))
    with pytest.raises(InvalidPlacement, match=why):
        solve(model(), cluster, workload)


def test_tied_embeddings_are_paid_once_on_one_device() -> None:
    ends = 200 * MIB
    units = (unit("embed", ends, read=1e-4), unit("layer 0", MIB), unit("head", ends))
    untied = model(units=units)
    tied = replace(untied, tied_bytes=formats_of(ends))
    cluster = Cluster((device(),))
    bills = [placement_memory(p, cluster, solve(p, cluster, Workload(), "bf16"))[0] for p in (untied, tied)]
    assert bills[0].weight_bytes - bills[1].weight_bytes == 2 * ends


def test_figures_that_were_not_measured_say_what_they_rest_on() -> None:
    each = UnitSeconds((DecodeLine(1, 1e-3, 0.0),), ((32, 1e-3),))
    timed = replace(model(), seconds={("cpu", "nf4"): DeviceSeconds(each, (each,) * 10)})
    card = replace(device("cuda:0"), source="datasheet", description="RTX 3050 4GB (datasheet)")
    assert not any("timed" in note for note in notes_of(solve(timed, Cluster((device(),)), Workload(), "nf4")))
    assert "int8 on cpu was not timed" in notes_of(solve(timed, Cluster((device(),)), Workload(), "int8"))[0]
    notes = notes_of(solve(timed, Cluster((card,)), Workload(), "int8"))
    assert notes == ("from published figures, not measured: cuda:0 is RTX 3050 4GB",)


def notes_of(placement: Placement) -> tuple[str, ...]:
    assert placement.estimate is not None
    return placement.estimate.notes


def test_the_runner_up_is_compared_with_the_speed_that_is_predicted() -> None:
    """Where all layers are on a card the engine finds its caches warm."""
    cards = (device(), device("cuda:0", bandwidth=400e9), device("cuda:1", bandwidth=390e9))
    plan = solve(model(), Cluster(cards, step_s=2e-3, warm_step_s=5e-4), Workload(context=256), "bf16")
    assert plan.device_names == ("cuda:0",)
    assert plan.estimate is not None
    (note,) = (note for note in plan.estimate.notes if note.startswith("the best plan without"))
    assert f"instead of {plan.estimate.decode_tokens_per_s:,.0f} tok/s" in note


def test_the_quality_that_is_advised_is_enough() -> None:
    profile, advised = model(layers=8, values=10 * MIB), 0
    for budget in range(60, 160, 10):
        slow = device(budget=budget * MIB, formats=("int8",))
        card = device("cuda:0", budget=110 * MIB, bandwidth=20e9, context_bytes=0, formats=("nf4",))
        cluster = Cluster((slow, card))
        try:
            solve(profile, cluster, Workload(context=512), quality="0.05")
        except DoesNotFit as refused:
            if "allow that with --quality " in str(refused):
                solve(profile, cluster, Workload(context=512), quality=str(refused).rpartition(" ")[2])
                advised += 1
    assert advised


@pytest.mark.parametrize("advised", [False, True])
def test_only_a_format_that_keeps_more_than_the_plan_is_advised(advised: bool) -> None:
    """bf16 beside a little of int8; where all is int8, and that alone can be, nothing."""
    formats = ("bf16",) if advised else ("int8",)
    card = device("cuda:0", budget=85 * MIB, bandwidth=300e9, context_bytes=0, formats=("int8",))
    cluster = Cluster((device(budget=2 * GIB, formats=formats), card))
    found = solve(model(layers=8, values=10 * MIB), cluster, Workload(context=512), quality="int8")
    assert {stage.weights for stage in found.stages} == {*formats, "int8"}
    assert found.estimate is not None
    assert any("--quality, such as bf16, keeps more" in note for note in found.estimate.notes) == advised
