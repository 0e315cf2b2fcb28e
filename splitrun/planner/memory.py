"""Itemised memory of a plan, per device. Pure arithmetic over the profile; the solver counts with the same functions.

Every item but workspace and margin is a sum over units. Workspace is the largest need of any single unit, because a
device computes one unit at a time and its allocator reuses what is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from splitrun.planner import kv
from splitrun.planner.estimate import DeviceMemory as DeviceMemory
from splitrun.planner.facts import VALUE_BYTES, Cluster, Device, ModelProfile, Workload
from splitrun.planner.placement import KVSpec, KVType, Placement, StageSpec, ValueType

LOGIT_COPIES = 3
"""Logits in float32, their sorted or filtered copy, and the probabilities."""
SCORED_CHUNK_TOKENS = 32
"""Prompt tokens that get logits at once when a prompt's log-probabilities are wanted."""
SCORE_BYTES = 10
"""Of a written-out score beside two copies in the compute type: the softmax in float32, in and out, and a copy."""
SLABS = 2
"""A card computes with the weights in one while the other is filled."""
ALLOCATOR_BYTES = {"cpu": 4 << 20}
DEFAULT_ALLOCATOR_BYTES = 32 << 20
"""A GPU's matrix library keeps up to 32 MiB, and its allocator rounds segments up; the C library keeps freed pages."""
LOST_TO_CHUNKS = 0.6
"""Of what torch's operators take for a history on a processor: each chunk's temporaries are larger than the last one's,
so those that the C library keeps serve no further chunk. Over eight layers nothing to three quarters were seen: with so
much the least is expected within 5 %, and the most keeps within the margin."""
ALLOCATOR_SHARE = 128
"""One part in so many of weights and KV is lost to rounding of tensors up to allocation blocks."""
MARGIN_BYTES = {"cpu": 16 << 20}
DEFAULT_MARGIN_BYTES = 32 << 20
MARGIN_SHARE = 64
"""For safety: what no measurement has seen. One part in so many of weights and KV besides."""


@dataclass(frozen=True)
class UnitMemory:
    """Bytes of one unit on one device; ``workspace_bytes`` is free again when the unit has computed."""

    weight_bytes: int
    kv_bytes: int
    state_bytes: int
    workspace_bytes: int


def compute_dtype(device: Device, weights: str) -> ValueType:
    """The type a stage computes and passes activations in: a dense format's own, else the device's."""
    return stage_dtype(device.compute_dtype, weights)


def stage_dtype(half_type: ValueType, weights: str) -> ValueType:
    """``compute_dtype`` on a device of that 16-bit type."""
    return cast(ValueType, weights) if weights in VALUE_BYTES else half_type


def kv_dtype_on(device: Device, weights: str) -> KVType:
    """The type a stage keeps K and V in: the device's, else that which it computes in."""
    return device.kv_dtype or compute_dtype(device, weights)


def unit_memory(
    profile: ModelProfile, unit: int, device: Device, weights: str, workload: Workload, kv_spec: KVSpec
) -> UnitMemory:
    """What unit number ``unit`` takes on ``device`` in the format ``weights``."""
    facts = profile.units[unit]
    dtype = kv_spec.dtype or compute_dtype(device, weights)
    return UnitMemory(
        weight_bytes=facts.weight_bytes[weights],
        kv_bytes=kv.unit_kv_bytes(facts, profile.groups, workload, dtype, kv_spec.device_blocks),
        state_bytes=kv.unit_state_bytes(facts, workload),
        workspace_bytes=workspace_bytes(profile, unit, device, weights, workload, dtype),
    )


def workspace_bytes(
    profile: ModelProfile, unit: int, device: Device, weights: str, workload: Workload, kv_dtype: str
) -> int:
    """Temporary bytes while the unit computes its largest step: as measured, or as its shapes say.

    By shapes, and with int8 KV, the sum of: hidden states in and out and the largest intermediate, for a whole chunk
    (for the head: one row per session); one matrix turned back into the compute type, for int8 and nf4; the history of
    all sessions gathered for attention (one session's twice, while it is copied), spread over the query heads, and its
    mask; the scores, where attention writes them out; for the head the logits in float32, ``LOGIT_COPIES`` times, and
    those of a chunk of a prompt that is scored.
    """
    facts = profile.units[unit]
    head = unit == len(profile.units) - 1
    scored = _scored_bytes(profile, device, weights, workload) if head else 0
    measured = profile.peaks.get((device.name, weights))
    if measured is not None and kv_dtype != "int8":
        kept = kv.kept_tokens(facts, profile.groups, workload)
        lost = LOST_TO_CHUNKS if device.kind == "cpu" and weights in VALUE_BYTES else 0.0
        timed = profile.seconds.get((device.name, weights))
        step = timed.units[unit].chunk_step if timed is not None else 1
        arguments = (workload.chunk_tokens, workload.sessions, workload.context, kept, lost, step)
        return max(measured[unit].bytes_at(*arguments), scored)
    value_bytes = VALUE_BYTES[compute_dtype(device, weights)]
    tokens = workload.sessions if head else max(workload.chunk_tokens, workload.sessions)
    total = tokens * (2 * profile.hidden_values + facts.activation_values_per_token) * value_bytes
    if weights in ("int8", "nf4"):
        total += facts.largest_weight_values * value_bytes
    if facts.kv_values_per_token:
        read_as = compute_dtype(device, weights) if kv_dtype == "int8" else kv_dtype
        gathered = kv.gathered_kv_bytes(facts, profile.groups, workload, read_as)
        total += gathered * (1 + facts.heads_per_kv) + gathered // max(workload.sessions, 1)
        pairs = min(workload.chunk_tokens, workload.context) * workload.context
        total += pairs * (value_bytes + 1) + pairs * facts.score_heads * (2 * value_bytes + SCORE_BYTES)
    return total + scored


def _scored_bytes(profile: ModelProfile, device: Device, weights: str, workload: Workload) -> int:
    """Of the head: logits of every session, sorted and filtered, and those of a chunk of a prompt that is scored."""
    value_bytes = VALUE_BYTES[compute_dtype(device, weights)]
    sampled = workload.sessions * profile.vocabulary * 4 * LOGIT_COPIES
    return sampled + min(SCORED_CHUNK_TOKENS, workload.context) * profile.vocabulary * (value_bytes + 8)


def allocator_bytes(device: Device, held_bytes: int) -> int:
    """What allocators and libraries take beside ``held_bytes`` of weights, KV and state."""
    return ALLOCATOR_BYTES.get(device.kind, DEFAULT_ALLOCATOR_BYTES) + held_bytes // ALLOCATOR_SHARE


def margin_bytes(device: Device, held_bytes: int) -> int:
    """Room left free for safety."""
    return MARGIN_BYTES.get(device.kind, DEFAULT_MARGIN_BYTES) + held_bytes // MARGIN_SHARE


def device_memory(
    device: Device,
    budget_bytes: int,
    units: Sequence[UnitMemory],
    shared_weight_bytes: int = 0,
    stream_bytes: int = 0,
) -> DeviceMemory:
    """The device's bill for those units; ``shared_weight_bytes`` are in two of them and paid once. ``stream_bytes``
    are for prompts that a card computes for the processor: its slabs and temporaries, or the processor's pinned memory;
    shown with the workspace."""
    weights = sum(unit.weight_bytes for unit in units) - shared_weight_bytes
    cache, state = sum(unit.kv_bytes for unit in units), sum(unit.state_bytes for unit in units)
    return DeviceMemory(
        device=device.name,
        memory_pool=device.memory_pool,
        budget_bytes=budget_bytes,
        weight_bytes=weights,
        kv_bytes=cache,
        state_bytes=state,
        workspace_bytes=max((unit.workspace_bytes for unit in units), default=0) + stream_bytes,
        context_bytes=device.context_bytes,
        allocator_bytes=allocator_bytes(device, weights + cache + state),
        margin_bytes=margin_bytes(device, weights + cache + state),
    )


def placement_memory(profile: ModelProfile, cluster: Cluster, placement: Placement) -> tuple[DeviceMemory, ...]:
    """One bill per device of the placement, in the order of its first stage."""
    bills = []
    streaming = any(stage.stream_buffer_bytes and "/" not in stage.device for stage in placement.stages)
    cards = set(cluster.local_cards()) & set(placement.device_names)
    with_layers = {stage.device for stage in placement.stages if computes_layers(stage)}
    for name in placement.device_names:
        device = cluster.device(name).in_use(name in with_layers, "cpu" in placement.device_names)
        if cards and name == "cpu":
            more = cluster.card_process_bytes + (cluster.card_layers_bytes if cards & with_layers else 0)
            device = replace(device, context_bytes=device.context_bytes + more)
        units: list[UnitMemory] = []
        embed_formats, head_formats = set(), set()
        for stage in (stage for stage in placement.stages if stage.device == name):
            arguments = (device, stage.weights, placement.workload, stage.kv)
            units += [unit_memory(profile, unit, *arguments) for unit in stage.units]
            embed_formats |= {stage.weights} if stage.embed else set()
            head_formats |= {stage.weights} if stage.head else set()
        shared = sum(profile.tied_bytes.get(weights, 0) for weights in embed_formats & head_formats)
        slabs = sum(stage.stream_buffer_bytes for stage in placement.stages if stage.device == name)
        slabs += _streamed_workspace_bytes(profile, placement, device) if slabs else 0
        if streaming:
            own = (stage for stage in placement.stages if stage.device == name)
            slabs += max(pinned_bytes(profile, stage, device, placement.workload) for stage in own)
        budget = placement.devices.get(name, device.budget_bytes)
        bills.append(device_memory(device, budget, units, shared, slabs))
    return tuple(bills)


def computes_layers(stage: StageSpec) -> bool:
    """Whether layers compute on the stage's device: its own, or prompts of others' in its slabs."""
    return stage.layers[0] < stage.layers[1] or stage.stream_buffer_bytes > 0


def streams(stage: StageSpec, workload: Workload) -> bool:
    """Whether a card with slabs in the same process computes prompts of the stage: layers on this machine's processor,
    and chunks as long as that takes."""
    on_processor = stage.device.partition(":")[0] == "cpu" and stage.layers[0] < stage.layers[1]
    return on_processor and stage.stream_from_tokens <= workload.chunk_tokens


def _streamed_workspace_bytes(profile: ModelProfile, placement: Placement, card: Device) -> int:
    """Temporary bytes on a card for prompts of layers on the processor, which it may compute beside its own."""
    workload = placement.workload
    found = 0
    for stage in placement.stages:
        if streams(stage, workload):
            kv_dtype = stage.kv.dtype or compute_dtype(card, stage.weights)
            kept = max(_kept_bytes(profile, stage, workload, kv_dtype))
            needed = workspace_bytes(profile, stage.layers[0] + 1, card, stage.weights, workload, kv_dtype)
            found = max(found, needed + SLABS * kept)
    return found


def pinned_bytes(profile: ModelProfile, stage: StageSpec, device: Device, workload: Workload) -> int:
    """Pinned main memory through which the KV of a stage's prompts goes to a card and back; 0 where nothing does.

    A history for each slab, and of every layer the blocks with new tokens, all held until the chunk is done. The
    weights are pinned where they lie. torch rounds pinned memory up to powers of two.
    """
    if not streams(stage, workload):
        return 0
    kv_dtype = stage.kv.dtype or compute_dtype(device, stage.weights)
    kept = _kept_bytes(profile, stage, workload, kv_dtype)
    new_tokens = workload.chunk_tokens + 2 * workload.block_tokens  # the first and the last block hold others too
    written = _kept_bytes(profile, stage, replace(workload, context=min(new_tokens, workload.context)), kv_dtype)
    return SLABS * _power_of_two(max(kept)) + sum(map(_power_of_two, written))


def _kept_bytes(profile: ModelProfile, stage: StageSpec, workload: Workload, kv_dtype: str) -> list[int]:
    """Bytes of one session's KV in each layer of the stage."""
    units = (profile.units[unit] for unit in range(stage.layers[0] + 1, stage.layers[1] + 1))
    return [kv.unit_kv_bytes(unit, profile.groups, workload, kv_dtype) // workload.sessions for unit in units]


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length() if size else 0


def pool_budgets(cluster: Cluster) -> dict[str, int]:
    """Bytes that the devices of each memory pool may take together: the largest budget among them."""
    budgets: dict[str, int] = {}
    for device in cluster.devices:
        budgets[device.memory_pool] = max(budgets.get(device.memory_pool, 0), device.budget_bytes)
    return budgets


def over_budget(bills: Iterable[DeviceMemory], pools: Mapping[str, int] | None = None) -> dict[str, int]:
    """Device -> bytes beyond its budget, or beyond what is left of the budget of a pool that several devices share.

    ``pools`` is ``pool_budgets`` of the cluster; without it a pool's budget is the largest among the bills.
    """
    bills = tuple(bills)
    largest: dict[str, int] = {}
    for bill in bills:
        largest[bill.memory_pool] = max(largest.get(bill.memory_pool, 0), bill.budget_bytes)
    largest |= pools or {}
    excess: dict[str, int] = {}
    used: dict[str, int] = {}
    for bill in bills:
        used[bill.memory_pool] = used.get(bill.memory_pool, 0) + bill.total_bytes
        beyond = max(bill.total_bytes - bill.budget_bytes, used[bill.memory_pool] - largest[bill.memory_pool])
        if beyond > 0:
            excess[bill.device] = beyond
    return excess
