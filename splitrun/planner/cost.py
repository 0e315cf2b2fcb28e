"""Predicted seconds of units, hops and whole plans, from bandwidths and rates.

A decoded token reads its weights and history once, so a unit takes the longer of moving those bytes and computing,
plus a fixed overhead; a prompt chunk likewise, its weights read once. Stages of one step follow each other; nothing
is assumed to overlap but the steps of different sessions (throughput). Knows nothing of budgets.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from splitrun.planner import kv
from splitrun.planner.estimate import Estimate, StageEstimate
from splitrun.planner.facts import VALUE_BYTES, Cluster, Device, ModelProfile, Workload
from splitrun.planner.keeping import with_kept
from splitrun.planner.memory import compute_dtype, placement_memory, unit_memory
from splitrun.planner.placement import Placement, StageSpec
from splitrun.planner.seconds import UnitSeconds

PROMPT_TOKENS = 512
"""Length of the reference prompt (or the context, where that is shorter)."""
ENGINE_DEVICE = "cpu"
"""Token ids start and end here: the engine's scheduler is on the host."""
TOKEN_BYTES = 4
DECODE_ERROR, FIRST_TOKEN_ERROR = 0.1, 0.15
"""What timed units foretold was off by at most so much in nine of ten runs (tests/bench/results/predictions.md and
predictions-gpu.md), however steady each unit was."""


def reference_prompt(workload: Workload) -> int:
    """Tokens of the prompt that first-token figures are for."""
    if workload.prompt_tokens is not None:
        return workload.prompt_tokens
    return min(PROMPT_TOKENS, workload.context)


def reference_history(workload: Workload) -> int:
    """Tokens in the cache that decoding figures are for: a session half way through its context."""
    if workload.history_tokens is not None:
        return workload.history_tokens
    return workload.context // 2


def decode_s(
    profile: ModelProfile, unit: int, device: Device, weights: str, workload: Workload, kv_dtype: str, rows: int = 1
) -> float:
    """Seconds for one token of each of ``rows`` sequences, each with the reference history."""
    measured, facts = profile.seconds.get((device.name, weights)), profile.units[unit]
    if measured is not None:
        history = kv.looked_back(facts, profile.groups, reference_history(workload))
        return measured.units[unit].decode_s(rows, history)
    weight_bytes = min(facts.weight_bytes[weights], facts.read_bytes[weights] * rows)
    history = kv.history_bytes(facts, profile.groups, reference_history(workload), kv_dtype)
    moving = (weight_bytes + rows * history) / device.bandwidth_bytes_per_s
    return max(moving, rows * facts.flops_per_token / device.flops_per_s) + device.unit_overhead_s


def prefill_s(
    profile: ModelProfile, unit: int, device: Device, weights: str, workload: Workload, kv_dtype: str
) -> float:
    """Seconds for the reference prompt, chunk after chunk; the head computes its last row only."""
    measured, facts = profile.seconds.get((device.name, weights)), profile.units[unit]
    head = unit == len(profile.units) - 1
    if measured is not None:
        most = kv.looked_back(facts, profile.groups, workload.context)
        return _chunks_s(measured.units[unit], workload, most, last_only=head)
    if head:
        return decode_s(profile, unit, device, weights, workload, kv_dtype)
    prompt = reference_prompt(workload)
    chunks = -(-prompt // workload.chunk_tokens)
    tokens = prompt / chunks
    weight_bytes = min(facts.weight_bytes[weights], facts.read_bytes[weights] * tokens)
    history = kv.history_bytes(facts, profile.groups, prompt // 2, kv_dtype)
    moving = (weight_bytes + history) / device.bandwidth_bytes_per_s
    return chunks * (max(moving, tokens * facts.flops_per_token / device.flops_per_s) + device.unit_overhead_s)


def _chunks_s(unit: UnitSeconds, workload: Workload, most: int, last_only: bool = False) -> float:
    """Seconds for the reference prompt: whole chunks, each behind those before it (``most`` of their tokens are read),
    and what is left; or for that alone, with which a sample is drawn."""
    prompt, size = reference_prompt(workload), workload.chunk_tokens
    starts = range(0, prompt, size)[-1 if last_only else 0 :]
    return sum(unit.prefill_s(min(size, prompt - start), min(start, most)) for start in starts)


def stage_overhead_s(
    profile: ModelProfile, device: Device, weights: str, workload: Workload, prefill: bool, rows: int = 1
) -> float:
    """Seconds that every stage takes beside its units, per step or for the reference prompt; 0 where not measured."""
    measured = profile.seconds.get((device.name, weights))
    if measured is None:
        return 0.0
    if prefill:
        return _chunks_s(measured.stage, workload, workload.context)
    return measured.stage.decode_s(rows, reference_history(workload))


def objective_rows(workload: Workload) -> int:
    """Rows in the step that the objective looks at: one user's, or everybody's."""
    return workload.sessions if workload.objective == "throughput" else 1


def unit_s(profile: ModelProfile, unit: int, device: Device, weights: str, workload: Workload, kv_dtype: str) -> float:
    """Seconds of one unit in what the objective minimises."""
    if workload.objective == "first-token":
        return prefill_s(profile, unit, device, weights, workload, kv_dtype)
    return decode_s(profile, unit, device, weights, workload, kv_dtype, objective_rows(workload))


def hop_s(
    cluster: Cluster, source: str, target: str, token_bytes: int, workload: Workload, prefill: bool, rows: int = 1
) -> float:
    """Seconds to hand one step's rows (or the whole prompt) from one device to the next; 0 on the same device."""
    if source == target:
        return 0.0
    link = cluster.link(source, target)
    if prefill:
        prompt = reference_prompt(workload)
        chunks = -(-prompt // workload.chunk_tokens)
        return chunks * link.latency_s + prompt * token_bytes / link.bandwidth_bytes_per_s
    return link.latency_s + rows * token_bytes / link.bandwidth_bytes_per_s


def engine_hop_s(cluster: Cluster, device: str, workload: Workload, prefill: bool, rows: int = 1) -> float:
    """Seconds for a step's ids from the engine to the first stage, or of the tokens back from the last one.

    On the engine's own machine they are part of a step's and the stages' own seconds.
    """
    if "/" not in device:
        return 0.0
    return hop_s(cluster, ENGINE_DEVICE, device, TOKEN_BYTES, workload, prefill, rows)


def activation_bytes(profile: ModelProfile, device: Device, weights: str) -> int:
    """Bytes of one token's hidden state as that device passes it on."""
    return profile.hidden_values * VALUE_BYTES[compute_dtype(device, weights)]


def stage_kv_dtype(stage: StageSpec, device: Device) -> str:
    """The type of the stage's KV cache, decided if the placement leaves it open."""
    return stage.kv.dtype or compute_dtype(device, stage.weights)


def path_s(profile: ModelProfile, cluster: Cluster, placement: Placement, prefill: bool, rows: int = 1) -> list[float]:
    """Seconds of each hop: engine to the first stage, between stages, and back from the last one."""
    stages, workload = placement.stages, placement.workload
    hops = [
        hop_s(cluster, stage.device, following.device, activation_bytes(profile, cluster.device(stage.device),
              stage.weights), workload, prefill, rows)
        for stage, following in pairwise(stages)
    ]  # fmt: skip
    ends = [engine_hop_s(cluster, stage.device, workload, prefill, rows) for stage in (stages[0], stages[-1])]
    return [ends[0], *hops, ends[1]]


def stage_s(
    profile: ModelProfile, cluster: Cluster, placement: Placement, stage: StageSpec, prefill: bool, rows: int = 1
) -> float:
    """Seconds of one stage for a step of ``rows`` rows, or for the reference prompt."""
    device, workload = cluster.device(stage.device), placement.workload
    dtype = stage_kv_dtype(stage, device)
    own = stage_overhead_s(profile, device, stage.weights, workload, prefill, rows)
    if prefill:
        return own + sum(prefill_s(profile, unit, device, stage.weights, workload, dtype) for unit in stage.units)
    return own + sum(decode_s(profile, unit, device, stage.weights, workload, dtype, rows) for unit in stage.units)


def busy_s(profile: ModelProfile, cluster: Cluster, placement: Placement, rows: int) -> dict[str, float]:
    """Device -> seconds it computes per step of ``rows`` rows, all its stages together."""
    seconds = dict.fromkeys(placement.device_names, 0.0)
    for stage in placement.stages:
        seconds[stage.device] += stage_s(profile, cluster, placement, stage, False, rows)
    return seconds


def pass_s(profile: ModelProfile, cluster: Cluster, placement: Placement, prefill: bool, rows: int = 1) -> float:
    """Seconds from the engine through all stages and back, the engine's own included."""
    stages = (stage_s(profile, cluster, placement, stage, prefill, rows) for stage in placement.stages)
    own = engine_s(cluster, placement.workload, prefill, warm=not reads_memory(cluster, placement))
    return sum(stages) + sum(path_s(profile, cluster, placement, prefill, rows)) + own


def engine_s(cluster: Cluster, workload: Workload, prefill: bool, warm: bool = False) -> float:
    """Seconds of the engine itself for a step, or for the reference prompt; ``warm`` where no stage on the processor
    reads so much that the engine finds empty caches."""
    step_s = cluster.warm_step_s if warm and cluster.warm_step_s is not None else cluster.step_s
    return _chunks(workload) * step_s + cluster.request_s if prefill else step_s


def reads_memory(cluster: Cluster, placement: Placement) -> bool:
    """Whether layers or the head lie on a processor: embeddings are but looked up."""
    on_processor = (stage for stage in placement.stages if cluster.device(stage.device).kind == "cpu")
    return any(stage.head or stage.layers[0] < stage.layers[1] for stage in on_processor)


def _chunks(workload: Workload) -> int:
    return -(-reference_prompt(workload) // workload.chunk_tokens)


def score(profile: ModelProfile, cluster: Cluster, placement: Placement) -> float:
    """Seconds that the placement's objective minimises: a token, the slowest device, or the reference prompt."""
    objective = placement.workload.objective
    if objective == "throughput":
        return max(busy_s(profile, cluster, placement, objective_rows(placement.workload)).values())
    return pass_s(profile, cluster, placement, prefill=objective == "first-token")


def best_streams(profile: ModelProfile, cluster: Cluster, placement: Placement) -> int:
    """The number of streams with the most tokens per second; of equals the fewest."""
    numbers = range(1, min(placement.workload.sessions, len(placement.device_names)) + 1)
    return max(numbers, key=lambda streams: throughput_tokens_per_s(profile, cluster, placement, streams))


def throughput_tokens_per_s(profile: ModelProfile, cluster: Cluster, placement: Placement, streams: int) -> float:
    """Tokens per second of all sessions in that many groups, which follow each other through the stages."""
    sessions = placement.workload.sessions
    rows = -(-sessions // streams)
    slowest = max(busy_s(profile, cluster, placement, rows).values())
    return sessions / max(streams * slowest, pass_s(profile, cluster, placement, False, rows))


def placement_spread(profile: ModelProfile, cluster: Cluster, placement: Placement, prefill: bool) -> float:
    """How far the plan's seconds may be off, as a share: each stage's own, weighted by what it takes."""
    weighted = total = 0.0
    least = FIRST_TOKEN_ERROR if prefill else DECODE_ERROR
    for stage in placement.stages:
        device = cluster.device(stage.device)
        measured = profile.seconds.get((stage.device, stage.weights))
        seconds = stage_s(profile, cluster, placement, stage, prefill)
        units = [least, *(measured.units[unit].spread for unit in stage.units)] if measured else [device.spread]
        weighted += seconds * max(units)
        total += seconds
    return weighted / total if total else 0.0


def estimate(
    profile: ModelProfile, cluster: Cluster, placement: Placement, limit: str = "", notes: Iterable[str] = ()
) -> Estimate:
    """What the placement is predicted to do on that cluster; KeyError when it names a device that is not there."""
    workload = placement.workload
    step_s = pass_s(profile, cluster, placement, prefill=False)
    from splitrun.planner.stream import first_token_gain_s  # here, because it counts with this module

    first_token_s = pass_s(profile, cluster, placement, prefill=True)
    first_token_s -= first_token_gain_s(profile, cluster, placement)
    rows = []
    hops = path_s(profile, cluster, placement, prefill=False)[1:]
    for stage, hop in zip(placement.stages, hops, strict=True):
        device = cluster.device(stage.device)
        units = [unit_memory(profile, unit, device, stage.weights, workload, stage.kv) for unit in stage.units]
        shared = profile.tied_bytes.get(stage.weights, 0) if stage.embed and stage.head else 0
        rows.append(
            StageEstimate(
                device=stage.device,
                units=stage.units_text,
                weights=stage.weights,
                weight_bytes=sum(unit.weight_bytes for unit in units) - shared,
                kv_bytes=sum(unit.kv_bytes + unit.state_bytes for unit in units),
                decode_s=stage_s(profile, cluster, placement, stage, prefill=False),
                prefill_s=stage_s(profile, cluster, placement, stage, prefill=True),
                hop_s=hop,
            )
        )
    streams = min(placement.streams or len(placement.device_names), workload.sessions)
    return Estimate(
        step_s=step_s,
        decode_tokens_per_s=1.0 / step_s,
        throughput_tokens_per_s=throughput_tokens_per_s(profile, cluster, placement, streams),
        time_to_first_token_s=first_token_s,
        prefill_tokens_per_s=reference_prompt(workload) / first_token_s,
        history_tokens=reference_history(workload),
        prompt_tokens=reference_prompt(workload),
        context=workload.context,
        sessions=workload.sessions,
        stages=tuple(rows),
        devices=with_kept(profile, cluster, placement, placement_memory(profile, cluster, placement)),
        limit=limit,
        notes=tuple(notes),
        spread=placement_spread(profile, cluster, placement, prefill=False),
        first_token_spread=placement_spread(profile, cluster, placement, prefill=True),
        streams=streams,
    )
