"""How a plan's figures come about, with formulas and the numbers in them: the long form of the explanation.

Reads the placement and its stored estimate; computes nothing anew, so that what is told is what was planned.
"""

from __future__ import annotations

from shlex import quote

from splitrun.errors import InvalidPlacement
from splitrun.planner.estimate import DeviceMemory, Estimate
from splitrun.planner.memory import ALLOCATOR_SHARE, MARGIN_SHARE
from splitrun.planner.placement import Placement
from splitrun.quantities import format_bytes, format_rate, format_seconds

SLABS_TEXT = "  with slabs a layer on the processor takes the longer of copying its weights and computing on the card"


def derivation(placement: Placement) -> list[str]:
    """Lines of text. Raises InvalidPlacement for a placement without an estimate."""
    stored = placement.estimate
    if stored is None:
        raise InvalidPlacement(
            f"the placement has no estimate to explain; plan again with: splitrun plan {quote(placement.model.source)}"
        )
    return [
        *_decoding(stored),
        "",
        *_prompt(placement, stored),
        "",
        *_memory(placement, stored),
        "",
        *_search(placement),
    ]


def _decoding(stored: Estimate) -> list[str]:
    """Σ stages + Σ hops."""
    lines = [
        f"Decoding, one token after {stored.history_tokens:,} others: t = Σ stages + Σ hops + engine",
        "  a stage takes s + Σ units (a + b · context): s of any stage, a and b timed on one unit of each shape;",
        "  where nothing was timed, a unit takes max(bytes / bandwidth, operations / rate) + overhead",
    ]
    for number, stage in enumerate(stored.stages):
        lines.append(
            f"  stage {number}  {stage.device}, {stage.units}, {stage.weights}: {format_seconds(stage.decode_s)}"
        )
        if stage.hop_s:
            lines.append(f"  hop      latency + bytes / bandwidth: {format_seconds(stage.hop_s)}")
    known = sum(stage.decode_s + stage.hop_s for stage in stored.stages)
    lines.append(f"  engine, and the way to the first stage: {format_seconds(max(0.0, stored.step_s - known))}")
    rate = format_rate(stored.decode_tokens_per_s)
    lines.append(f"  t = {format_seconds(stored.step_s)}, 1 / t = {rate}, ± {stored.spread:.0%}")
    if stored.sessions > 1:
        lines.append(
            f"  {stored.sessions} sessions in {stored.streams} streams: a round takes the longer of t with a stream's "
            f"rows and {stored.streams} · the busiest device: {format_rate(stored.throughput_tokens_per_s)}"
        )
    return lines


def _prompt(placement: Placement, stored: Estimate) -> list[str]:
    chunk = placement.workload.chunk_tokens
    chunks = -(-stored.prompt_tokens // chunk)
    stages = " + ".join(format_seconds(stage.prefill_s) for stage in stored.stages)
    slabs = any(stage.stream_buffer_bytes for stage in placement.stages)
    beside_s = stored.time_to_first_token_s - sum(stage.prefill_s for stage in stored.stages)
    beside = "hops, the engine and the request itself"
    if slabs:  # what they gain is more than these take
        rest = f"with slabs, {beside}"
    else:
        rest = f"{beside} {format_seconds(max(0.0, beside_s))}: together"
    return [
        f"First token of {stored.prompt_tokens:,}: {chunks} chunk{'s' * (chunks != 1)} of up to {chunk} tokens "
        "through every stage,",
        "  a chunk takes what chunks of 32 and 512 tokens took, on the line between, and c · tokens · history more",
        *([SLABS_TEXT] * slabs),
        f"  stages {stages}; {rest} {format_seconds(stored.time_to_first_token_s)}",
    ]


def _memory(placement: Placement, stored: Estimate) -> list[str]:
    workload = placement.workload
    lines = [
        "Memory of a device: weights + KV + workspace + process or context + allocator + margin <= budget",
        f"  KV       {workload.sessions} x ceil({workload.context} / {workload.block_tokens}) blocks of "
        f"{workload.block_tokens} tokens, times the bytes of K and V per token and layer",
        "  workspace  the largest need of any one unit, measured by running its largest steps; one computes at a time",
        "  process  Python, torch and the engine in main memory, measured; context: what a card's driver takes",
        f"  allocator  what allocators round up: one part in {ALLOCATOR_SHARE} of weights and KV, and a fixed part",
        f"  margin   left free for safety: one part in {MARGIN_SHARE} of weights and KV, and a fixed part",
    ]
    return lines + [_bill(memory) for memory in stored.devices]


def _bill(memory: DeviceMemory) -> str:
    total, budget = format_bytes(memory.total_bytes), format_bytes(memory.budget_bytes)
    items = " + ".join(f"{name} {format_bytes(amount)}" for name, amount in memory.items() if amount)
    return f"  {memory.device}: {items} = {total} <= {budget}"


def _search(placement: Placement) -> list[str]:
    goals = {
        "latency": "the sum over stages and hops",
        "throughput": "the seconds of the busiest device",
        "first-token": "the seconds to the first token",
    }
    return [
        f"Of all ways to share {placement.layers} layers in runs among the devices, embedding and head on any of them, "
        "in any",
        f"  weight format, this one makes {goals[placement.workload.objective]} smallest: a dynamic program over runs, "
        "device",
        "  order and subsets of devices, equal to trying everything",
    ]
