"""A model with half of its layers on a card held to a budget, the rest on the CPU, NF4 on both sides.

    python tests/bench/half_on_card.py [--budget 1GiB] [--slabs 56MiB] [--card cuda:0] [--model NAME] [--vs accelerate]
        [--half-only] [--all-context]

Without --model, weights are random in the shape of DeepSeek-R1-Distill-Qwen-1.5B, which has 28 layers. The bench
holds torch's allocator on the card to the budget less the measured context: that of the driver alone, before any kernel
is loaded (with --all-context: with the kernels that torch and its libraries load, which the budgets of `splitrun plan`
count too). Two placements run: the half, and what the planner makes of the same budget. Each ends with one JSON line of
`splitrun bench`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from shapes import DEFAULT, MODEL_HELP, model_of

from splitrun.quantities import parse_bytes

HALF = """version: 1
model: {{source: {model}, layers: {layers}}}
workload: {{context: {context}, sessions: 1}}
stages:
  - {{device: cpu, units: [embed], weights: nf4}}
  - {{device: "{card}", layers: [0, {half}], weights: nf4, stream_buffer: {slabs}}}
  - {{device: cpu, units: [head], layers: [{half}, {layers}], weights: nf4}}
devices: {{"{card}": {{memory: {budget}}}, cpu: {{memory: {host}}}}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="1GiB")
    parser.add_argument("--slabs", default="56MiB", help="memory for weights that are copied for prompts; 0MB: none")
    parser.add_argument("--all-context", action="store_true")
    parser.add_argument("--half-only", action="store_true", help="without what the planner makes of the budget")
    parser.add_argument("--host", default="8GiB")
    parser.add_argument("--card", default="cuda:0")
    parser.add_argument("--model", default=DEFAULT, help=MODEL_HELP)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--vs", action="append", default=[])
    args = parser.parse_args()
    if not args.all_context:
        kernels = loaded_kernels(args.card)
        args.budget = str(parse_bytes(args.budget) + kernels)
        print(f"kernels that torch loads into the context, counted beside the budget: {kernels >> 20} MiB")
    with tempfile.TemporaryDirectory() as folder:
        model, load = model_of(args.model, folder)
        context = args.prompt_tokens + args.new_tokens
        half = Path(folder, "half.yaml")
        layers = json.loads(Path(model, "config.json").read_text())["num_hidden_layers"]
        sizes = {"budget": args.budget, "host": args.host, "slabs": args.slabs, "context": context}
        half.write_text(HALF.format(model=model, card=args.card, layers=layers, half=layers // 2, **sizes))
        common = ["--prompt-tokens", str(args.prompt_tokens), "--new-tokens", str(args.new_tokens), "--json"]
        common += ["--no-predict"]
        common += ["--repeat", str(args.repeat), "--load", load]
        versus = [word for name in args.vs for word in ("--vs", name)]
        memory = f"{args.card}={args.budget},cpu={args.host}"
        planned = [model, "--memory", memory, "--weights", "nf4", "--context", str(context)]
        codes = [run([str(half), *common, *versus])]
        if not args.half_only:
            codes.append(run([*planned, *common]))
    sys.exit(max(codes))


def loaded_kernels(card: str) -> int:
    """Bytes by which the context grows with torch's first product, measured in a process of its own."""
    code = (
        "import torch; card = torch.device('CARD'); kept = torch.empty(1, device=card); "
        "free = lambda: torch.cuda.mem_get_info(card)[0] + torch.cuda.memory_reserved(card); before = free(); "
        "product = torch.ones((64, 64), device=card, dtype=torch.float16); product @ product; "
        "torch.cuda.synchronize(card); print(before - free())"
    )
    command = [sys.executable, "-c", code.replace("CARD", card)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run(words: list[str]) -> int:
    """One bench in a process of its own; its exit status."""
    return subprocess.run([sys.executable, "-m", "splitrun", "bench", *words], check=False).returncode


if __name__ == "__main__":
    main()
