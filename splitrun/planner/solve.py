"""Find the placement: the fastest split under the budgets, each stage in the weight format that suits it best.

Under "auto" every device may take any of its formats, within a limit on what the whole plan loses in precision. Where
that limit or memory binds, embedding and head may take others than the layers of their device; for speed alone they do
not, since what a stage more gains is less than timing can tell. Layers of one device have one format: only the ends may
come back to a device. The answer carries its estimate, the constraint that binds, the runner-up, and what was left out
and why. Raises DoesNotFit (``refuse.py``) when nothing fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from splitrun.errors import DoesNotFit, InvalidPlacement
from splitrun.planner.alike import MAX_SUBSETS, classes_of, subsets
from splitrun.planner.cost import best_streams, engine_s, estimate, reads_memory
from splitrun.planner.facts import FORMATS, Cluster, Device, ModelProfile, Workload
from splitrun.planner.formats import allowed_formats, device_formats
from splitrun.planner.many import fastest_of_many, least_with_layers_on
from splitrun.planner.memory import computes_layers, kv_dtype_on
from splitrun.planner.placement import KVSpec, ModelRef, Placement, StageSpec
from splitrun.planner.problem import Split, Tables, used_devices
from splitrun.planner.quality import DEFAULT_LIMIT, loss_limit, loss_share, most_lost, placement_loss, share_of
from splitrun.planner.reasons import (
    Findings,
    calibrations,
    left_out,
    limit,
    measure_text,
    more_context,
    other_format,
    runner_up,
    slowest,
    untimed,
)
from splitrun.planner.refuse import does_not_fit
from splitrun.planner.search import Outcome, fastest
from splitrun.planner.stream import prompt_notes, with_stream_buffer
from splitrun.planner.tables import build_tables
from splitrun.planner.within import fastest_within
from splitrun.quantities import format_bytes, format_seconds

NO_CARD, ENDS_ONLY, WITH_LAYERS = range(3)
"""What a plan pays for in main memory: nothing, cards for embedding and head alone, cards for layers too."""
ROUNDING = 1e-9
"""Sums of the same seconds in another order differ by less."""
EMBED, LAYERS, HEAD = range(3)
"""Parts of a device, each with a format of its own."""


@dataclass(frozen=True)
class _Found:
    """A plan, what it takes by its objective, and the same plan with all that is to be said of it, made when asked
    for. No plan without layers on local cards takes less than ``off_cards_s``."""

    value: float
    plan: Placement
    explained: Callable[[], Placement]
    off_cards_s: float = 0.0


class _Refused(Exception):
    """Nothing fits. ``error`` makes what the user is told, which takes longer than to find out."""

    def __init__(self, error: Callable[[], DoesNotFit]) -> None:
        self.error = error


def solve(
    profile: ModelProfile,
    cluster: Cluster,
    workload: Workload,
    weights: str = "auto",
    quality: str = DEFAULT_LIMIT,
    stream: bool = False,
) -> Placement:
    """The best placement for ``workload.objective`` that keeps every budget.

    ``weights`` is a format, or "auto" for the fastest mix whose loss of precision stays within ``quality``: a format's
    name (as much as with everything in it) or a share of that of nf4. ``stream`` gives a card with memory of its own
    slabs for the weights of layers on the processor, where prompts gain by it. Beyond eight devices that differ the
    plan says how far from the best it may be. Raises DoesNotFit with the shortfall per device and what would fit;
    InvalidPlacement when the request contradicts the model.
    """
    cards = cluster.local_cards()
    if not (cards and cluster.card_process_bytes and any(device.name == "cpu" for device in cluster.devices)):
        try:
            return _solve(profile, cluster, workload, weights, quality, stream).explained()
        except _Refused as refused:
            raise refused.error() from None
    uses = {WITH_LAYERS: cluster.with_card_in_use(layers=True), NO_CARD: cluster.without(cards)}
    if cluster.card_layers_bytes:
        uses[ENDS_ONLY] = cluster.with_card_in_use(layers=False)
    found: dict[int, _Found] = {}
    refusals: dict[int, _Refused] = {}
    for paid, use in uses.items():
        try:
            found[paid] = _solve(profile, use, workload, weights, quality, stream and paid == WITH_LAYERS)
        except _Refused as refused:
            refusals[paid] = refused
        if WITH_LAYERS in found and found[WITH_LAYERS].off_cards_s > found[WITH_LAYERS].value * (1 + ROUNDING):
            break  # whatever else is paid for, it is slower
    if not found:
        raise min((refusals[paid].error() for paid in sorted(refusals)), key=_hardness)
    # Of equals the one that pays least; but slabs for prompts, which ends have none of, are worth paying for.
    taken = min(found, key=lambda paid: (found[paid].value, stream and paid == ENDS_ONLY, paid))
    best, dearer = found[taken].explained(), [each for paid, each in sorted(found.items()) if paid > taken]
    assert best.estimate is not None
    notes = _unpaid(cluster, best, dearer) if taken != WITH_LAYERS else []
    return replace(best, estimate=replace(best.estimate, notes=(*notes, *best.estimate.notes)))


def _hardness(refusal: DoesNotFit) -> tuple[bool, int]:
    """Sorts first what misses least, and last what no memory would mend."""
    return not refusal.shortfall_bytes, sum(refusal.shortfall_bytes.values())


def _unpaid(cluster: Cluster, plan: Placement, dearer: Sequence[_Found]) -> list[str]:
    """What to know of local cards that the plan does not use, or not for layers; ``dearer`` are the plans where more
    main memory was paid for them."""
    cards = cluster.local_cards()
    if not set(cards) & set(plan.device_names):
        unwanted = [each for each in dearer if not set(cards) & set(each.plan.device_names)]
        if unwanted and (told := unwanted[-1].explained().estimate) is not None:
            return [note for note in told.notes if note.partition(" ")[0] in cards]
        more = format_bytes(cluster.card_process_bytes)
        return [f"{' and '.join(cards)} left out: a card in use takes {more} more of main memory"]
    plans = [plan, *(each.plan for each in dearer)]
    with_layers = [any(computes_layers(each) for each in one.stages if each.device in cards) for one in plans]
    if cluster.card_layers_bytes and not with_layers[0] and all(with_layers[1:]):
        more = format_bytes(cluster.card_layers_bytes)
        return [f"no layers on {' and '.join(cards)}: there they take {more} more of main memory"]
    return []


def _solve(
    profile: ModelProfile, cluster: Cluster, workload: Workload, weights: str, quality: str, stream: bool
) -> _Found:
    """As ``solve``; what the process takes is the same whatever the plan uses. Raises _Refused."""
    check_request(profile, cluster, workload)
    tried = allowed_formats(profile, weights)
    formats = device_formats(profile, cluster, weights)
    if not any(formats.values()):
        raise _Refused(lambda: does_not_fit(profile, cluster, workload, tried))
    devices = [device for device in cluster.devices if formats[device.name]]
    tables = build_tables(profile, cluster, formats, workload)
    if subsets(classes_of(tables)) > MAX_SUBSETS:
        value, many = _of_many(profile, cluster, workload, devices, formats, quality if weights == "auto" else None)
        return _Found(value, many, lambda: _with_slabs(profile, cluster, many) if stream else many)
    tables, outcome, quickest, plan = _searched(profile, cluster, workload, tables, formats, weights, quality)

    def explained() -> Placement:
        unable = [device.name for device in cluster.devices if device not in devices]
        notes = [f"{name} was left out: it does not compute {' or '.join(tried)}" for name in unable]
        own_s = engine_s(cluster, workload, workload.objective == "first-token", not reads_memory(cluster, plan))
        limited = weights == "auto" and most_lost(profile, formats) > loss_limit(profile, quality)
        most = loss_limit(profile, quality) if limited else math.inf
        found = Findings(tables, outcome, devices, profile, cluster, formats, workload, own_s, most)
        notes += left_out(found)
        if outcome is quickest:
            notes += runner_up(found) or other_format(found)
            notes += more_context(found)
            binding = limit(found)
        else:
            binding = f"--quality {quality}: weights that lose more would give {found.instead(quickest.value)}"
        notes += untimed(profile, cluster, plan)
        if weights == "auto":
            notes += _losses(profile, plan, [name for name in tried if any(name in each for each in formats.values())])
        told = _predicted(profile, cluster, plan, binding, notes)
        return _with_slabs(profile, cluster, told) if stream else told

    elsewhere = [number for number, device in enumerate(devices) if device.name not in cluster.local_cards()]
    least_s = least_with_layers_on(tables, elsewhere, workload.objective == "throughput")
    return _Found(outcome.value, plan, explained, least_s)


def _searched(
    profile: ModelProfile,
    cluster: Cluster,
    workload: Workload,
    tables: Tables,
    formats: Mapping[str, tuple[str, ...]],
    weights: str,
    quality: str,
) -> tuple[Tables, Outcome, Outcome, Placement]:
    """The best split within ``quality``: the tables it is of, itself, the best whatever it loses, and its placement.
    Raises _Refused."""
    bottleneck, most = workload.objective == "throughput", loss_limit(profile, quality)
    devices = [device for device in cluster.devices if formats[device.name]]
    outcome = quickest = fastest(tables, bottleneck)
    if outcome.split is None and weights == "auto":  # the ends of a leaner format may need more workspace
        tables = build_tables(profile, cluster, formats, workload, apart=True)
        outcome = quickest = fastest(tables, bottleneck)
    if outcome.split is None:
        raise _Refused(lambda: does_not_fit(profile, cluster, workload, allowed_formats(profile, weights)))
    plan = build_placement(profile, devices, workload, outcome.split)
    if weights == "auto" and placement_loss(profile, plan) > most:
        tables = build_tables(profile, cluster, formats, workload, apart=True)
        outcome = fastest_within(tables, profile, bottleneck, most)
        if outcome.split is None:
            raise _Refused(lambda: _too_lossy(profile, cluster, plan, quality))
        return tables, outcome, quickest, build_placement(profile, devices, workload, outcome.split)
    return tables, outcome, quickest, plan


def _losses(profile: ModelProfile, plan: Placement, tried: Sequence[str]) -> list[str]:
    """What the weights lose, and what to ask for to keep more; ``tried`` are the formats, most precise first."""
    loss = loss_share(profile, plan)
    better = [name for name in tried if share_of(name, profile.stored_format) < loss * (1 - ROUNDING)]
    if not loss or not better:
        return []
    told = "all weights are nf4" if loss > 0.995 else f"weights lose {loss:.0%} of what nf4 throughout loses"
    return [f"{told}; --quality, such as {better[-1]}, keeps more of their precision"]


def _predicted(
    profile: ModelProfile, cluster: Cluster, plan: Placement, binding: str, notes: Sequence[str]
) -> Placement:
    """The plan with its predictions and, where sessions can take turns on several devices, its streams."""
    if plan.workload.sessions > 1 and len(plan.device_names) > 1:
        plan = replace(plan, streams=best_streams(profile, cluster, plan))
    notes = [*notes, *calibrations(profile, plan)]
    return replace(plan, estimate=estimate(profile, cluster, plan, binding, notes))


def _with_slabs(profile: ModelProfile, cluster: Cluster, plan: Placement) -> Placement:
    """The plan with slabs for prompts where they fit and gain, and with what is to be said of them."""
    assert plan.estimate is not None
    streaming = with_stream_buffer(profile, cluster, plan)
    notes = [*plan.estimate.notes, *prompt_notes(profile, cluster, streaming)]
    return replace(streaming, estimate=estimate(profile, cluster, streaming, plan.estimate.limit, notes))


def _of_many(
    profile: ModelProfile,
    cluster: Cluster,
    workload: Workload,
    devices: Sequence[Device],
    formats: Mapping[str, tuple[str, ...]],
    quality: str | None,
) -> tuple[float, Placement]:
    """As ``_solve`` for more devices than the exact search takes: with how far from the best the plan may be.

    A plan that loses more than ``quality`` is searched again without the least precise format, for all devices alike.
    """
    bottleneck = workload.objective == "throughput"
    tried = [name for name in FORMATS if any(name in each for each in formats.values())]
    first: Placement | None = None
    lower = 0.0
    for count in range(len(tried), 0, -1):
        named = {name: tuple(each for each in found if each in tried[:count]) for name, found in formats.items()}
        able = [device for device in devices if named[device.name]]
        tables = build_tables(profile, cluster, named, workload)
        outcome, least = fastest_of_many(tables, bottleneck)
        lower = lower or least  # with every format: no plan with fewer is faster
        if outcome.split is None:
            break
        plan = build_placement(profile, able, workload, outcome.split)
        if quality is None or placement_loss(profile, plan) <= loss_limit(profile, quality):
            more = outcome.value / lower - 1 if lower > 0 else 0.0
            notes = [
                f"{len(devices)} devices are too many, and too different, to be searched exactly: this plan takes "
                f"{measure_text(workload, outcome.value)}, no plan less than {format_seconds(lower)}, so it is at most "
                f"{more:.1%} from the best"
            ]
            speed = f"speed of {slowest(tables, outcome.split, able)}"
            return outcome.value, _predicted(profile, cluster, plan, speed, notes)
        first = first or plan
    lossy = first
    if lossy is None or quality is None:
        raise _Refused(lambda: does_not_fit(profile, cluster, workload, tried))
    raise _Refused(lambda: _too_lossy(profile, cluster, lossy, quality))


def _too_lossy(profile: ModelProfile, cluster: Cluster, plan: Placement, quality: str) -> DoesNotFit:
    share = loss_share(profile, plan)
    return DoesNotFit(
        f"no plan within --quality {quality} fits; the fastest without it loses {share:.0%} of what nf4 does: allow "
        f"that with --quality {math.ceil(share * 100) / 100:.2f}",
        dict.fromkeys((device.name for device in cluster.devices), 0),
    )


def build_placement(profile: ModelProfile, devices: Sequence[Device], workload: Workload, split: Split) -> Placement:
    """The placement of a split: embed and head join the run beside them where device and format are the same."""

    def stage(number: int, part: int, start: int, stop: int, embed: bool = False, head: bool = False) -> StageSpec:
        device, weights = devices[number], FORMATS[split.formats[number][part]]
        kv = KVSpec(dtype=kv_dtype_on(device, weights))
        return StageSpec(device.name, embed, (start, stop), head, weights, kv)

    stages = [stage(number, LAYERS, start, stop) for number, start, stop in split.runs]
    embed = stage(split.embed, EMBED, 0, 0, embed=True)
    head = stage(split.head, HEAD, profile.layers, profile.layers, head=True)
    if _together(embed, stages[0]):
        stages[0] = replace(stages[0], embed=True)
    else:
        stages.insert(0, embed)
    if _together(head, stages[-1]):
        stages[-1] = replace(stages[-1], head=True)
    else:
        stages.append(head)
    return Placement(
        version=1,
        model=ModelRef(profile.source, profile.revision, profile.layers, profile.fingerprint or None),
        workload=workload,
        stages=tuple(stages),
        devices={devices[number].name: devices[number].budget_bytes for number in used_devices(split)},
    )


def _together(end: StageSpec, run: StageSpec) -> bool:
    return (end.device, end.weights) == (run.device, run.weights)


def check_kv(cluster: Cluster, kv: str) -> None:
    """Raise InvalidPlacement where K and V are to be kept in int8 and no processor is there to do so."""
    if kv == "int8" and not any(device.kind == "cpu" for device in cluster.devices):
        raise InvalidPlacement("--kv int8 is for processors: name cpu in --memory too, or leave --kv out")


def check_request(profile: ModelProfile, cluster: Cluster, workload: Workload) -> None:
    """Raise InvalidPlacement where the request contradicts the model or names no device."""
    if not cluster.devices:
        raise InvalidPlacement("no device to plan for; name some with --memory, as in --memory cpu=4GiB")
    if profile.layers < 1:
        raise InvalidPlacement(f"{profile.source} has no layers; point splitrun at a decoder-only language model")
    if workload.context > profile.max_context:
        raise InvalidPlacement(
            f"context {workload.context} is longer than the {profile.max_context} tokens that {profile.source} "
            f"knows; use --context {profile.max_context} or less"
        )
