"""Find the placement: the fastest split under the budgets, in the most precise weight format that fits.

One format for all stages; formats are tried from the most precise that the checkpoint allows. The answer carries its
estimate, the constraint that binds, and what was left out and why. Raises DoesNotFit (``refuse.py``) when nothing fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from splitrun.errors import InvalidPlacement
from splitrun.planner.cost import estimate
from splitrun.planner.facts import FORMATS, Cluster, Device, ModelProfile, Workload
from splitrun.planner.memory import compute_dtype
from splitrun.planner.placement import KVSpec, ModelRef, Placement, StageSpec
from splitrun.planner.reasons import left_out, limit
from splitrun.planner.refuse import does_not_fit, shortfall_text
from splitrun.planner.search import MAX_DEVICES, Split, fastest, least_excess, used_devices
from splitrun.planner.tables import build_tables

QUANTIZED = ("int8", "nf4")


def solve(profile: ModelProfile, cluster: Cluster, workload: Workload, weights: str = "auto") -> Placement:
    """The best placement for ``workload.objective`` that keeps every budget.

    ``weights`` is a format, or "auto" for the most precise that fits. Raises DoesNotFit with the shortfall per device
    and what would fit; InvalidPlacement when the request contradicts the model or names more than 8 devices.
    """
    _check(profile, cluster, workload)
    formats = allowed_formats(profile, weights)
    notes: list[str] = []
    for weight_format in formats:
        devices = [device for device in cluster.devices if weight_format in device.formats]
        if not devices:
            notes.append(f"{weight_format} was not used: no device here computes it")
            continue
        tables = build_tables(profile, cluster, devices, workload, weight_format)
        outcome = fastest(tables, bottleneck=workload.objective == "throughput")
        if outcome.split is None:
            short = shortfall_text(tables, least_excess(tables).split, devices)
            notes.append(f"{weight_format} was not used: it does not fit, {short} short")
            continue
        unable = [device.name for device in cluster.devices if device not in devices]
        notes += [f"{name} was left out: it does not compute {weight_format}" for name in unable]
        notes += left_out(outcome, devices, workload)
        plan = build_placement(profile, devices, workload, outcome.split, weight_format)
        why = limit(tables, outcome, devices, workload)
        return replace(plan, estimate=estimate(profile, cluster, plan, why, notes))
    raise does_not_fit(profile, cluster, workload, formats)


def allowed_formats(profile: ModelProfile, weights: str = "auto") -> tuple[str, ...]:
    """The formats to try, most precise first.

    Under "auto" none is more precise than the checkpoint's own; a checkpoint that is quantized stays as it is.
    Raises InvalidPlacement for a format that the model cannot be loaded in.
    """
    stored = profile.stored_format
    known = tuple(name for name in FORMATS if all(name in unit.weight_bytes for unit in profile.units))
    possible = tuple(name for name in known if name == stored) if stored in QUANTIZED else known
    if weights == "auto":
        choices = tuple(name for name in possible if FORMATS.index(name) >= FORMATS.index(stored))
    else:
        choices = tuple(name for name in possible if name == weights)
    if choices:
        return choices
    allowed = ", ".join(possible)
    if weights != "auto" and weights not in FORMATS:
        raise InvalidPlacement(f"weights {weights!r} is not a format; use --weights auto, or one of {allowed}")
    raise InvalidPlacement(
        f"{profile.source} is stored as {stored} and cannot be loaded as {weights}; use --weights with {allowed}"
    )


def build_placement(
    profile: ModelProfile, devices: Sequence[Device], workload: Workload, split: Split, weights: str
) -> Placement:
    """The placement of a split: embed and head join the run beside them when it is on the same device."""

    def stage(number: int, start: int, stop: int, embed: bool = False, head: bool = False) -> StageSpec:
        device = devices[number]
        kv = KVSpec(dtype=compute_dtype(device, weights))
        return StageSpec(device.name, embed, (start, stop), head, weights, kv)

    stages = [stage(*run) for run in split.runs]
    if split.runs[0][0] == split.embed:
        stages[0] = replace(stages[0], embed=True)
    else:
        stages.insert(0, stage(split.embed, 0, 0, embed=True))
    if split.runs[-1][0] == split.head:
        stages[-1] = replace(stages[-1], head=True)
    else:
        stages.append(stage(split.head, profile.layers, profile.layers, head=True))
    return Placement(
        version=1,
        model=ModelRef(profile.source, profile.revision, profile.layers, profile.fingerprint or None),
        workload=workload,
        stages=tuple(stages),
        devices={devices[number].name: devices[number].budget_bytes for number in used_devices(split)},
    )


def _check(profile: ModelProfile, cluster: Cluster, workload: Workload) -> None:
    if not cluster.devices:
        raise InvalidPlacement("no device to plan for; name some with --memory, as in --memory cpu=4GiB")
    if len(cluster.devices) > MAX_DEVICES:
        count = len(cluster.devices)
        raise InvalidPlacement(f"{count} devices are more than the planner searches; name {MAX_DEVICES} with --memory")
    if profile.layers < 1:
        raise InvalidPlacement(f"{profile.source} has no layers; point splitrun at a decoder-only language model")
    if workload.context > profile.max_context:
        raise InvalidPlacement(
            f"context {workload.context} is longer than the {profile.max_context} tokens that {profile.source} "
            f"knows; use --context {profile.max_context} or less"
        )
