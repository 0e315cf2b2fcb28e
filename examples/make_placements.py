"""Plan for hardware that is not here: write the ready placements from facts given by hand.

    python examples/make_placements.py [FOLDER]          # default: placements

Facts of the machines are data-sheet figures, facts of the models follow from their configs; nothing is measured and
nothing is loaded. The predictions in the files are therefore what ``splitrun.planner.solve`` expects of such hardware.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from splitrun.planner.cost import estimate as estimate_of
from splitrun.planner.datasheet import find_device
from splitrun.planner.estimate import Estimate
from splitrun.planner.facts import Cluster, Device, KVGroup, ModelProfile, UnitProfile, Workload
from splitrun.planner.placement import ModelRef, Placement, StageSpec
from splitrun.planner.placement_file import dump
from splitrun.planner.solve import solve
from splitrun.planner.what_if import Changes, changed, machine_of
from splitrun.quantities import format_bytes, format_rate, format_seconds

GIB = 1 << 30
BLOCK = 64  # values that share one scale in nf4
UNPACKED = 1 << 23  # values of a quantized matrix that a prompt turns back at a time


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
    stages: tuple[StageSpec, ...] = ()


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
            largest_weight_values=min(hidden * inner, UNPACKED),
            quantized_values=sum(rows * columns for rows, columns in shapes),
        )
        for index in range(config["num_hidden_layers"])
    ]
    embed = UnitProfile("embed", table, {name: size // vocabulary for name, size in table.items()}, 0.0)
    embed = replace(embed, quantized_values=vocabulary * hidden)
    head_bytes = total(table, vector_bytes(hidden))
    head = UnitProfile(
        name="head",
        weight_bytes=head_bytes,
        read_bytes=head_bytes,
        flops_per_token=2.0 * vocabulary * hidden,
        activation_values_per_token=3 * hidden,
        largest_weight_values=min(vocabulary * hidden, UNPACKED),
        quantized_values=vocabulary * hidden,
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


def llama_profile() -> ModelProfile:
    """Llama-3.1-8B, from its published config."""
    config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    }
    return qwen_profile("meta-llama/Llama-3.1-8B-Instruct", config, bias_values=0, norm_values=0)


def processor(name: str, budget_bytes: int, bandwidth: float, flops: float) -> Device:
    """A virtual processor with a budget of its own."""
    facts = find_device("desktop DDR4 CPU", "device").device(name, "host" if name == "cpu" else name)
    sizes = {"total_bytes": budget_bytes, "free_bytes": budget_bytes, "budget_bytes": budget_bytes}
    return replace(
        facts,
        description=f"a processor that reads {bandwidth / 1e9:.0f} GB/s",
        bandwidth_bytes_per_s=bandwidth,
        flops_per_s=flops,
        **sizes,
    )


def from_sheets(
    name: str,
    profile: ModelProfile,
    workload: Workload,
    machine: str,
    weights: str = "auto",
    changes: Changes | None = None,
) -> Ready:
    """A placement for hardware from the data sheets, and the command that plans it."""
    changes = changes or Changes()
    cluster, _ = changed(machine_of(machine), changes)
    words = [f"--machine '{machine}'"]
    words += [f"--add '{card}'" for card in changes.add]
    words += [f"--add-node '{node}'" for node in changes.add_node]
    words += [f"--link {changes.link}"] * bool(changes.add_node)
    words += [f"--context {workload.context}"]
    words += [f"--weights {weights}"] * (weights != "auto")
    hardware = ", ".join([machine, *changes.add, *(f"a node with {node}" for node in changes.add_node)])
    if changes.add_node:
        hardware += f", joined by {changes.link}"
    return Ready(
        name, hardware, f"splitrun what-if {profile.source} {' '.join(words)}", profile, cluster, workload, weights
    )


def hybrid(ready: Ready, card: str) -> Ready:
    """The same hardware with the map that guides recommend: head on the graphics, everything else on the processor."""
    n = ready.profile.layers
    stages = (StageSpec("cpu", True, (0, n), False, ready.weights), StageSpec(card, False, (n, n), True, ready.weights))
    return replace(ready, name=f"{ready.name}-hybrid", stages=stages)


def ready_placements() -> list[Ready]:
    """The placements that splitrun ships."""
    small, large = deepseek_profile(), llama_profile()
    i7 = from_sheets("i7-uhd-630", small, Workload(context=256), "i7 DDR4 CPU", "int8", Changes(add=("UHD 630",)))
    lan = Changes(add_node=("GTX 1060 6GB", "RTX 2060 6GB"))
    two = (processor("cpu", GIB, 14e9, 0.5e12), processor("cpu:1", GIB, 14e9, 0.5e12))
    desktop, laptop = "desktop DDR4 CPU", "laptop DDR4 CPU"
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
        from_sheets("deepseek-1.5b-4gib-card", small, Workload(), desktop, "bf16", Changes(add=("RTX 3050 4GB",))),
        from_sheets("rtx-3050-4gb-fp16", small, Workload(context=1024), laptop, "fp16", Changes(add=("RTX 3050 4GB",))),
        from_sheets("rtx-3050-4gb-nf4", small, Workload(context=1024), laptop, "nf4", Changes(add=("RTX 3050 4GB",))),
        from_sheets("gtx-1060-3gb-int8", small, Workload(context=512), desktop, "int8", Changes(add=("GTX 1060 3GB",))),
        from_sheets("i7-cpu-only", small, Workload(context=256), "i7 DDR4 CPU", "int8"),
        hybrid(i7, "xpu:0"),
        from_sheets("core-ultra", small, Workload(), "Core Ultra CPU", "auto", Changes(add=("Core Ultra iGPU",))),
        from_sheets(
            "8b-two-6gb-cards", large, Workload(), desktop, "int8", Changes(add=("GTX 1060 6GB", "GTX 1060 6GB"))
        ),
        from_sheets("8b-4gb-card", large, Workload(), desktop, "nf4", Changes(add=("RTX 3050 4GB",))),
        from_sheets("8b-three-node-lan", large, Workload(), "laptop DDR5 CPU", "int8", lan),
    ]


def planned(ready: Ready) -> Placement:
    """The placement with its estimate: the solver's, or the map given by hand."""
    if not ready.stages:
        return solve(ready.profile, ready.cluster, ready.workload, ready.weights, stream=True)
    names = dict.fromkeys(stage.device for stage in ready.stages)
    budgets = {name: ready.cluster.device(name).budget_bytes for name in names}
    model = ModelRef(ready.profile.source, layers=ready.profile.layers)
    plan = Placement(1, model, ready.workload, ready.stages, budgets)
    return replace(plan, estimate=estimate_of(ready.profile, ready.cluster, plan, "the map, which is given by hand"))


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
        f"command:   {ready.command}" + ("" if ready.stages else f" -o placements/{ready.name}.yaml"),
        f"predicted: {speed}; {memory}",
        "           from data-sheet facts by examples/make_placements.py; plan on your own machine for its figures",
    ]
    return "".join(f"# {line}\n" for line in lines)


def text_of(ready: Ready) -> str:
    """The whole file."""
    placement = planned(ready)
    assert placement.estimate is not None, "solve always adds its estimate"
    return header(ready, placement.estimate) + dump(placement)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "placements")
    folder.mkdir(parents=True, exist_ok=True)
    for ready in ready_placements():
        (folder / f"{ready.name}.yaml").write_text(text_of(ready), "utf-8")
        print(f"{folder / ready.name}.yaml")
        print(planned(ready).explain(), end="\n\n")


if __name__ == "__main__":
    main()
