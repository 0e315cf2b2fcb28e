"""Plan for hardware that is not here: write the ready placements from facts given by hand.

    python examples/make_placements.py [FOLDER]          # default: placements

Facts of the machines are data-sheet figures, facts of the models follow from their configs; nothing is measured and
nothing is loaded. The predictions in the files are therefore what ``splitrun.planner.solve`` expects of such hardware.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from splitrun.planner.estimate import Estimate
from splitrun.planner.facts import Cluster, Device, KVGroup, Link, ModelProfile, UnitProfile, Workload
from splitrun.planner.placement import Placement
from splitrun.planner.placement_file import dump
from splitrun.planner.solve import solve
from splitrun.quantities import format_bytes, format_rate, format_seconds

MIB, GIB = 1 << 20, 1 << 30
BLOCK = 64  # values that share one scale in nf4


@dataclass(frozen=True)
class Ready:
    """One placement to make: its file name, the hardware in words, the command that plans it, and the facts."""

    name: str
    hardware: str
    command: str
    profile: ModelProfile
    cluster: Cluster
    workload: Workload
    weights: str = "auto"


def matrix_bytes(rows: int, columns: int) -> dict[str, int]:
    """Bytes of one matrix in every format: int8 has a float32 scale per row, nf4 one per 64 values."""
    values = rows * columns
    int8, nf4 = values + 4 * rows, values // 2 + 4 * (values // BLOCK)
    return {"fp32": 4 * values, "bf16": 2 * values, "fp16": 2 * values, "int8": int8, "nf4": nf4}


def vector_bytes(values: int) -> dict[str, int]:
    """Bytes of norms and biases, which stay in the compute type."""
    return {name: (4 if name == "fp32" else 2) * values for name in ("fp32", "bf16", "fp16", "int8", "nf4")}


def total(*parts: dict[str, int]) -> dict[str, int]:
    """The sum of byte tables, format by format."""
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def qwen_profile(source: str, config: dict[str, Any], bias_values: int, norm_values: int) -> ModelProfile:
    """The facts of a Qwen model from its config; ``bias_values`` and ``norm_values`` per layer beside two norms."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_size = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head_size, config["num_key_value_heads"] * head_size
    shapes = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    small = vector_bytes(2 * hidden + bias_values + norm_values)
    layer_bytes = total(*(matrix_bytes(*shape) for shape in shapes), small)
    table = matrix_bytes(vocabulary, hidden)
    tied = bool(config["tie_word_embeddings"])
    layers = [
        UnitProfile(
            name=f"layer {index}",
            weight_bytes=layer_bytes,
            read_bytes=layer_bytes,
            flops_per_token=2.0 * sum(rows * columns for rows, columns in shapes),
            kv_values_per_token={"full": 2 * keys},
            activation_values_per_token=3 * inner,
            largest_weight_values=hidden * inner,
        )
        for index in range(config["num_hidden_layers"])
    ]
    embed = UnitProfile("embed", table, {name: size // vocabulary for name, size in table.items()}, 0.0)
    head_bytes = total(table, vector_bytes(hidden))
    head = UnitProfile(
        name="head",
        weight_bytes=head_bytes,
        read_bytes=head_bytes,
        flops_per_token=2.0 * vocabulary * hidden,
        activation_values_per_token=3 * hidden,
        largest_weight_values=vocabulary * hidden,
    )
    return ModelProfile(
        source=source,
        revision=None,
        fingerprint="",
        model_type=config["model_type"],
        units=(embed, *layers, head),
        groups=(KVGroup("full"),),
        hidden_values=hidden,
        vocabulary=vocabulary,
        max_context=config["max_position_embeddings"],
        stored_format="bf16",
        tied_bytes=table if tied else {},
    )


def demo_profile() -> ModelProfile:
    """The bundled model, from the config beside it."""
    text = (resources.files("splitrun") / "demo" / "config.json").read_text("utf-8")
    config = json.loads(text)
    return qwen_profile("demo", config, bias_values=0, norm_values=2 * config["head_dim"])


def deepseek_profile() -> ModelProfile:
    """DeepSeek-R1-Distill-Qwen-1.5B, from its published config."""
    config = {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    }
    return qwen_profile("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", config, bias_values=2048, norm_values=0)


def processor(name: str, budget_bytes: int, bandwidth: float, flops: float) -> Device:
    """A processor; further virtual ones draw on budgets of their own."""
    pool = "host" if name == "cpu" else name
    return Device(
        name=name,
        kind="cpu",
        description="processor",
        total_bytes=budget_bytes,
        free_bytes=budget_bytes,
        budget_bytes=budget_bytes,
        memory_pool=pool,
        context_bytes=0,
        bandwidth_bytes_per_s=bandwidth,
        flops_per_s=flops,
        unit_overhead_s=0.5e-3,
        compute_dtype="bf16",
    )


def card(budget_bytes: int, bandwidth: float, flops: float) -> Device:
    """A discrete GPU whose driver context takes 300 MiB."""
    return Device(
        name="cuda:0",
        kind="cuda",
        description="graphics card",
        total_bytes=4 * GIB,
        free_bytes=budget_bytes,
        budget_bytes=budget_bytes,
        memory_pool="cuda:0",
        context_bytes=300 * MIB,
        bandwidth_bytes_per_s=bandwidth,
        flops_per_s=flops,
        unit_overhead_s=0.4e-3,
        compute_dtype="bf16",
    )


def ready_placements() -> list[Ready]:
    """The placements that splitrun ships."""
    pcie = Link(latency_s=20e-6, bandwidth_bytes_per_s=12e9)
    host_and_card = Cluster((processor("cpu", 8 * GIB, 40e9, 0.5e12), card(3584 * MIB, 192e9, 9e12)), default_link=pcie)
    two = (processor("cpu", GIB, 14e9, 0.5e12), processor("cpu:1", GIB, 14e9, 0.5e12))
    return [
        Ready(
            "demo-cpu",
            "any x86 or ARM processor with two cores (28 GB/s of memory bandwidth assumed)",
            "splitrun plan demo --memory cpu=1GiB --context 2048",
            demo_profile(),
            Cluster((processor("cpu", GIB, 28e9, 1e12),)),
            Workload(context=2048),
        ),
        Ready(
            "demo-two-cpus",
            "one processor as two virtual devices, each its own worker (half of 28 GB/s assumed for each)",
            "splitrun plan demo --memory cpu=1GiB,cpu:1=1GiB --context 2048 --sessions 4 --objective throughput",
            demo_profile(),
            Cluster(two),
            Workload(context=2048, sessions=4, objective="throughput"),
        ),
        Ready(
            "deepseek-1.5b-4gib-card",
            "a 4 GiB card such as a GeForce RTX 3050 Laptop (192 GB/s), 3.5 GiB of it for splitrun, "
            "and a processor with two DDR4 channels (40 GB/s)",
            "splitrun plan deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --memory cuda:0=3584MiB,cpu=8GiB --context 4096",
            deepseek_profile(),
            host_and_card,
            Workload(context=4096),
        ),
    ]


def header(ready: Ready, estimate: Estimate) -> str:
    """The comment on top: hardware, command, predicted figures."""
    memory = ", ".join(f"{bill.device} {format_bytes(bill.total_bytes)}" for bill in estimate.devices)
    speed = f"{format_rate(estimate.decode_tokens_per_s)} decoding"
    if estimate.sessions > 1:
        speed += f" alone, {format_rate(estimate.throughput_tokens_per_s)} in {estimate.sessions} sessions"
    first = format_seconds(estimate.time_to_first_token_s)
    speed += f", first token of a {estimate.prompt_tokens}-token prompt after {first}"
    lines = [
        f"hardware:  {ready.hardware}",
        f"command:   {ready.command} -o placements/{ready.name}.yaml",
        f"predicted: {speed}; {memory}",
        "           from data-sheet facts by examples/make_placements.py; plan on your own machine for its figures",
    ]
    return "".join(f"# {line}\n" for line in lines)


def text_of(ready: Ready) -> str:
    """The whole file."""
    placement: Placement = solve(ready.profile, ready.cluster, ready.workload, ready.weights)
    assert placement.estimate is not None, "solve always adds its estimate"
    return header(ready, placement.estimate) + dump(placement)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "placements")
    folder.mkdir(parents=True, exist_ok=True)
    for ready in ready_placements():
        (folder / f"{ready.name}.yaml").write_text(text_of(ready), "utf-8")
        print(f"{folder / ready.name}.yaml")
        print(solve(ready.profile, ready.cluster, ready.workload, ready.weights).explain(), end="\n\n")


if __name__ == "__main__":
    main()
