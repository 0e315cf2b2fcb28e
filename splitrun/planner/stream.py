"""Prompts on a small card: the weights of layers that lie on the processor, copied to the card chunk by chunk.

While a layer computes on the card, the next one's weights arrive in the other of two slabs, so a layer takes the longer
of copying and computing. Worth it for chunks beyond a crossover; decoding stays on the processor. Off where host and
card share memory. Knows figures, no streams and no threads.
"""

from __future__ import annotations

from dataclasses import replace

from splitrun.planner.cost import prefill_s, reference_prompt, stage_kv_dtype
from splitrun.planner.facts import Cluster, Device, ModelProfile, Workload
from splitrun.planner.memory import SLABS, compute_dtype, over_budget, placement_memory, pool_budgets, streams
from splitrun.planner.placement import Placement, StageSpec
from splitrun.quantities import format_bytes, format_seconds

PADDING_BYTES = 8192
"""In a slab, for matrices that begin at round addresses."""
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Whose layers the card's kernels compute."""


def slab_bytes(profile: ModelProfile, stage: StageSpec) -> int:
    """Bytes of both slabs for the layers of a stage on the processor, in its format; 0 for a stage without layers."""
    units = range(stage.layers[0] + 1, stage.layers[1] + 1)
    largest = max((profile.units[unit].weight_bytes[stage.weights] for unit in units), default=0)
    return SLABS * (largest + PADDING_BYTES) if largest else 0


def streamed_s(profile: ModelProfile, cluster: Cluster, card: Device, stage: StageSpec, workload: Workload) -> float:
    """Seconds of the reference prompt through the stage's layers with their weights copied to the card.

    The first copy has nothing to hide behind; then each layer takes the longer of its copy and its computing.
    """
    link, dtype = cluster.link(stage.device, card.name), stage_kv_dtype(stage, card)
    profile = _unfilled(profile, card, stage.weights)
    chunks = -(-reference_prompt(workload) // workload.chunk_tokens)
    total, first = 0.0, 0.0
    for unit in range(stage.layers[0] + 1, stage.layers[1] + 1):
        copy_s = profile.units[unit].weight_bytes[stage.weights] / link.bandwidth_bytes_per_s
        first = first or copy_s
        total += max(chunks * copy_s, prefill_s(profile, unit, card, stage.weights, workload, dtype))
    return total + first


def _unfilled(profile: ModelProfile, card: Device, weights: str) -> ModelProfile:
    """The profile with what the card takes for the tokens of a chunk alone: here no graph asks for more of them."""
    measured = profile.seconds.get((card.name, weights))
    if measured is None:
        return profile
    units = tuple(replace(unit, chunk_step=1) for unit in measured.units)
    return replace(profile, seconds={**profile.seconds, (card.name, weights): replace(measured, units=units)})


def crossover_tokens(profile: ModelProfile, cluster: Cluster, placement: Placement, stage: StageSpec) -> int | None:
    """The shortest chunk, in tokens, for which copying the stage's layers to a card pays; None when none does."""
    card, workload = _card(cluster, placement), placement.workload
    if card is None or not _taken(profile, cluster, card, stage, workload):
        return None
    for tokens in (32, 64, 128, 256, 512, 1024, 2048):
        if tokens > workload.chunk_tokens:
            return None
        chunk = replace(workload, prompt_tokens=tokens)
        if streamed_s(profile, cluster, card, stage, chunk) < _resident_s(profile, cluster, stage, chunk):
            return tokens
    return None


def with_stream_buffer(profile: ModelProfile, cluster: Cluster, placement: Placement) -> Placement:
    """The placement with slabs on its card's first stage, where they fit its budget and shorten the first token.

    The slabs hold the largest layer of any stage that gains by them; each stage on the processor says from how many
    tokens on it does. Unchanged where nothing is gained.
    """
    made = _with_slabs(profile, cluster, placement)
    missing = over_budget(placement_memory(profile, cluster, made), pool_budgets(cluster))
    return placement if missing else made


def prompt_notes(profile: ModelProfile, cluster: Cluster, placement: Placement) -> list[str]:
    """What slabs gain, or would with how much more memory; nothing where prompts gain nothing by them."""
    made = _with_slabs(profile, cluster, placement)
    gain = first_token_gain_s(profile, cluster, made)
    if gain <= 0:
        return []
    missing = over_budget(placement_memory(profile, cluster, made), pool_budgets(cluster))
    earlier = f"the first token comes {format_seconds(gain)} earlier"
    if not missing:
        return [f"weights on the processor are copied to the card for prompts: {earlier}"]
    room = " and ".join(f"{format_bytes(size)} more on {name}" for name, size in missing.items())
    return [f"with {room} the weights on the processor could be copied to the card for prompts: {earlier}"]


def _with_slabs(profile: ModelProfile, cluster: Cluster, placement: Placement) -> Placement:
    """The placement with slabs, whether they fit or not; unchanged where nothing is gained."""
    card, stages = _card(cluster, placement), list(placement.stages)
    found = [crossover_tokens(profile, cluster, placement, stage) for stage in stages]
    gains = [stage for stage, tokens in zip(stages, found, strict=True) if tokens is not None]
    if card is None or not gains:
        return placement
    for index, tokens in enumerate(found):
        if streams(stages[index], placement.workload):
            stages[index] = replace(stages[index], stream_from_tokens=tokens or placement.workload.chunk_tokens + 1)
    size = max(slab_bytes(profile, stage) for stage in gains)
    index = next(number for number, stage in enumerate(stages) if stage.device == card.name)
    stages[index] = replace(stages[index], stream_buffer_bytes=size)
    return replace(placement, stages=tuple(stages))


def first_token_gain_s(profile: ModelProfile, cluster: Cluster, placement: Placement) -> float:
    """Seconds that the slabs of a placement take off its reference prompt: 0 without slabs, less where they cost."""
    card = _card(cluster, placement)
    if card is None or not any(stage.stream_buffer_bytes for stage in placement.stages):
        return 0.0
    gain = 0.0
    chunk = min(reference_prompt(placement.workload), placement.workload.chunk_tokens)
    for stage in placement.stages:
        if chunk >= stage.stream_from_tokens and _taken(profile, cluster, card, stage, placement.workload):
            streamed = streamed_s(profile, cluster, card, stage, placement.workload)
            gain += _resident_s(profile, cluster, stage, placement.workload) - streamed
    return gain


def _taken(profile: ModelProfile, cluster: Cluster, card: Device, stage: StageSpec, workload: Workload) -> bool:
    """Whether the card's kernels compute prompts of the stage's layers, in the type that the processor computes in."""
    types = {compute_dtype(device, stage.weights) for device in (card, cluster.device(stage.device))}
    plain = stage.kv.dtype != "int8"
    return profile.model_type in MODEL_TYPES and streams(stage, workload) and len(types) == 1 and plain


def _resident_s(profile: ModelProfile, cluster: Cluster, stage: StageSpec, workload: Workload) -> float:
    """Seconds of the reference prompt through the stage's layers where they lie."""
    device = cluster.device(stage.device)
    dtype = stage_kv_dtype(stage, device)
    units = range(stage.layers[0] + 1, stage.layers[1] + 1)
    return sum(prefill_s(profile, unit, device, stage.weights, workload, dtype) for unit in units)


def _card(cluster: Cluster, placement: Placement) -> Device | None:
    """The placement's first card with memory of its own on this machine."""
    devices = (cluster.device(name) for name in placement.device_names if "/" not in name)
    return next((device for device in devices if device.kind == "cuda" and device.memory_pool == device.name), None)
