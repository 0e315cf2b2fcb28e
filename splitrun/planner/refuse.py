"""Say no helpfully: what is missing on each device, and what would fit instead. Pure; only computes the refusal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from splitrun.errors import DoesNotFit
from splitrun.planner import kv
from splitrun.planner.alike import MAX_SUBSETS, classes_of, subsets
from splitrun.planner.facts import FORMATS, Cluster, Device, ModelProfile, Workload
from splitrun.planner.memory import kv_dtype_on, pool_budgets
from splitrun.planner.problem import Split, Tables, excess_of
from splitrun.planner.search import least_excess
from splitrun.planner.tables import build_tables
from splitrun.quantities import format_bytes


def does_not_fit(profile: ModelProfile, cluster: Cluster, workload: Workload, formats: Sequence[str]) -> DoesNotFit:
    """The error for a model that fits in none of ``formats`` (most precise first), with the shortfall per device; with
    none where no device computes them."""
    usable = [name for name in formats if any(device.holds_layers for device in _able(cluster, name))]
    if not usable:
        names = ", ".join(formats)
        return DoesNotFit(f"{profile.source} does not fit: no device computes {names}; add one with --memory")
    leanest = min(usable, key=lambda name: sum(unit.weight_bytes[name] for unit in profile.units))
    devices, tables = _searched(profile, cluster, _able(cluster, leanest), workload, leanest)
    split = least_excess(tables).split
    shortfall = dict.fromkeys((device.name for device in cluster.devices), 0)
    for device, missing in zip(devices, excess_of(tables, split) if split else [], strict=False):
        shortfall[device.name] = missing
    message = (
        f"{profile.source} does not fit in {leanest} at context {workload.context} x {workload.sessions}: "
        f"{shortfall_text(tables, split, devices)} short; {_advice(profile, cluster, workload, usable, leanest)}"
    )
    return DoesNotFit(message, shortfall)


def refuse_hopeless(profile: ModelProfile, cluster: Cluster, workload: Workload, formats: Sequence[str]) -> None:
    """Raise DoesNotFit where weights and KV alone take more than all budgets, in the leanest of ``formats`` for every
    unit: that is known before anything is measured, and no measurement can mend it."""
    usable = [name for name in formats if _able(cluster, name)]
    if not usable:
        return
    weights = sum(min(unit.weight_bytes[name] for name in usable) for unit in profile.units[1:-1])
    weights += _ends_bytes(profile, usable)
    cache = min(_kept(profile, device, workload, name) for name in usable for device in _able(cluster, name))
    taken, there = _taken_and_room(cluster)
    missing = weights + cache - there
    if missing <= 0:
        return
    leanest = min(usable, key=lambda name: sum(unit.weight_bytes[name] for unit in profile.units))
    less = f"lower --context {workload.context}" + (
        f" or --sessions {workload.sessions}" if workload.sessions > 1 else ""
    )
    leaner = [name for name in FORMATS[FORMATS.index(leanest) + 1 :] if _loadable(profile, name)]
    ways = [f"take --weights {leaner[-1]}"] if leaner else []
    ways += [less] if weights < there else []
    ways += ["give it more with --memory", "take a smaller model"]
    budgets = " and ".join(f"{format_bytes(device.budget_bytes)} on {device.name}" for device in cluster.devices)
    process = f", where process and context take {format_bytes(taken)}" if taken else ""
    message = (
        f"{profile.source} does not fit: in {leanest} its weights alone take {format_bytes(weights)} and its KV "
        f"{format_bytes(cache)}, and the budgets are {budgets}{process}: at least {format_bytes(missing)} too little; "
        f"{', '.join(ways[:-1])}, or {ways[-1]}"
    )
    largest = max(cluster.devices, key=lambda device: device.budget_bytes)
    shortfall = {device.name: missing if device is largest else 0 for device in cluster.devices}
    raise DoesNotFit(message, shortfall)


def _ends_bytes(profile: ModelProfile, formats: Sequence[str]) -> int:
    """The fewest bytes of embed and head together: what they share is there once where both have one format."""
    embed, head = profile.units[0].weight_bytes, profile.units[-1].weight_bytes
    together = (embed[name] + head[name] - profile.tied_bytes.get(name, 0) for name in formats)
    return min(*together, min(embed[name] for name in formats) + min(head[name] for name in formats))


def _taken_and_room(cluster: Cluster) -> tuple[int, int]:
    """Bytes that are taken before any model, of every memory the least that one device takes; and those of all budgets
    beside that. A memory with less than that has no room; where all have less, that of the one that lacks least counts,
    below 0."""
    taken: dict[str, int] = {}
    for device in cluster.devices:
        taken[device.memory_pool] = min(taken.get(device.memory_pool, device.context_bytes), device.context_bytes)
    rooms = [budget - taken[pool] for pool, budget in pool_budgets(cluster).items()]
    return sum(taken.values()), sum(room for room in rooms if room > 0) or max(rooms)


def shortfall_text(tables: Tables, split: Split | None, devices: Sequence[Device]) -> str:
    """ "1.20 GiB on cuda:0 and 300 MiB on cpu", for the split that misses least in all."""
    missing = excess_of(tables, split) if split else []
    short = [(device.name, size) for device, size in zip(devices, missing, strict=False) if size > 0]
    return " and ".join(f"{format_bytes(size)} on {name}" for name, size in short) or "some memory"


def fits(profile: ModelProfile, cluster: Cluster, workload: Workload, weights: str) -> bool:
    """Whether any plan in that format keeps the budgets."""
    devices = _able(cluster, weights)
    if not devices or _held(profile, devices, workload, weights) > sum(device.budget_bytes for device in devices):
        return False
    return _least(profile, cluster, devices, workload, weights) == 0


def _held(profile: ModelProfile, devices: Sequence[Device], workload: Workload, weights: str) -> int:
    """Bytes of weights, KV and states, which some device must hold at least, wherever the layers go."""
    held = sum(unit.weight_bytes[weights] for unit in profile.units) - profile.tied_bytes.get(weights, 0)
    return held + min(_kept(profile, device, workload, weights) for device in devices)


def _kept(profile: ModelProfile, device: Device, workload: Workload, weights: str) -> int:
    """Bytes of KV and states in all layers, if they were on that device."""
    dtype = kv_dtype_on(device, weights)
    return sum(
        kv.unit_kv_bytes(unit, profile.groups, workload, dtype) + kv.unit_state_bytes(unit, workload)
        for unit in profile.units
    )


def _least(
    profile: ModelProfile, cluster: Cluster, devices: Sequence[Device], workload: Workload, weights: str
) -> float:
    return least_excess(_searched(profile, cluster, devices, workload, weights)[1]).value


def _searched(
    profile: ModelProfile, cluster: Cluster, devices: Sequence[Device], workload: Workload, weights: str
) -> tuple[Sequence[Device], Tables]:
    """The problem in that format; with more devices than the exact search takes, that of the largest."""
    tables = build_tables(profile, cluster, {device.name: (weights,) for device in devices}, workload)
    if subsets(classes_of(tables)) <= MAX_SUBSETS:
        return devices, tables
    largest = sorted(devices, key=lambda device: -device.budget_bytes)[: MAX_SUBSETS.bit_length() - 1]
    devices = [device for device in devices if device in largest]
    return devices, build_tables(profile, cluster, {device.name: (weights,) for device in devices}, workload)


def _advice(profile: ModelProfile, cluster: Cluster, workload: Workload, tried: Sequence[str], leanest: str) -> str:
    """What would fit: fewer bits, a shorter context, fewer sessions, or all of them; else more memory."""
    leaner = [name for name in FORMATS[FORMATS.index(tried[-1]) + 1 :] if _loadable(profile, name)]
    context = _longest_context(profile, cluster, workload, leanest)
    sessions = _largest(
        workload.sessions - 1, lambda count: fits(profile, cluster, replace(workload, sessions=count), leanest)
    )
    enough = next((name for name in leaner if fits(profile, cluster, workload, name)), None)
    found = [f"--weights {enough}"] if enough else []
    found += [f"--context {context}"] if context else []
    found += [f"--sessions {sessions}"] if sessions else []
    if found:
        return "it fits with " + " or ".join(found)
    last = leaner[-1] if leaner else leanest
    context = _longest_context(profile, cluster, replace(workload, sessions=1), last) or workload.context
    if fits(profile, cluster, replace(workload, sessions=1, context=context), last):
        options = [f"--weights {last}"] if leaner else []
        options += [f"--context {context}"] if context < workload.context else []
        options += ["--sessions 1"] if workload.sessions > 1 else []
        return "it fits with " + " ".join(options)
    least = replace(workload, sessions=1, context=min(workload.context, workload.block_tokens))
    missing = _least(profile, cluster, _able(cluster, leanest), least, leanest)
    short = f"in {leanest} {least.context} tokens are {format_bytes(missing)} short"
    return f"nothing smaller fits either: {short}; give it more with --memory, or take a smaller model"


def _longest_context(profile: ModelProfile, cluster: Cluster, workload: Workload, weights: str) -> int:
    """The longest context below the workload's, in whole blocks, that fits; 0 when none does."""
    size = workload.block_tokens
    most = (workload.context - 1) // size
    return size * _largest(
        most, lambda blocks: fits(profile, cluster, replace(workload, context=blocks * size), weights)
    )


def _largest(most: int, holds: Callable[[int], bool]) -> int:
    """The largest count in 1 .. most for which ``holds``, which is true up to some count and false beyond; else 0."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _able(cluster: Cluster, weights: str) -> list[Device]:
    """The devices that compute the format."""
    return [device for device in cluster.devices if weights in device.formats]


def _loadable(profile: ModelProfile, weights: str) -> bool:
    stored = profile.stored_format
    known = all(weights in unit.weight_bytes for unit in profile.units)
    return known and (weights == stored or stored not in ("int8", "nf4"))
