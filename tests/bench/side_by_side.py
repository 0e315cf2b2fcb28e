"""Budgets on which accelerate's automatic device map fails or spills, beside splitrun's plan: one table.

    python tests/bench/side_by_side.py [--model NAME] [--card cuda:0] [--budgets 2GiB,4GiB] [--host 8GiB] [-o FILE.md]

Without --model, weights are random in the shape of DeepSeek-R1-Distill-Qwen-1.5B. With a card, the budgets are its own
and --host is main memory's; without one they are main memory's. Both run the same prompts under the same budgets, each
in a process of its own; accelerate in bf16, splitrun in the format its planner takes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import destinations
from shapes import DEFAULT, MODEL_HELP, model_of

from splitrun.bench import contest
from splitrun.bench.terms import Result
from splitrun.engine.loading import Load
from splitrun.errors import DoesNotFit
from splitrun.quantities import format_bytes, format_rate, parse_bytes


@dataclass(frozen=True)
class Pair:
    """One budget: splitrun's result or refusal, and accelerate's."""

    budget: str
    plan: str
    own: Result | None
    other: Result

    def row(self) -> str:
        """As a line of the table."""
        own = told(self.own) if self.own else self.plan
        ratio = "–"
        if self.own and not self.own.error and not self.other.error:
            ratio = f"{self.own.decode_tokens_per_s / max(self.other.decode_tokens_per_s, 1e-9):.1f} x"
        return f"| {self.budget} | {self.plan if self.own else 'refused'} | {own} | {told(self.other)} | {ratio} |"


def told(result: Result) -> str:
    """Speed and peaks, or the failure."""
    if result.error:
        return f"fails: {result.error[:160]}"
    where = "; ".join(f"{name}: {what}" for name, what in result.devices.items())
    peaks = ", ".join(f"{name} {format_bytes(size)}" for name, size in result.peak_bytes.items())
    return f"{format_rate(result.decode_tokens_per_s)}, peak {peaks} ({where})"


def main() -> None:
    """Run every budget and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT, help=MODEL_HELP)
    parser.add_argument("--card")
    parser.add_argument("--budgets", default="1200MiB,1800MiB,3GiB,5GiB")
    parser.add_argument("--host", default="8GiB")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("-o", "--output", type=destinations.file)
    args = parser.parse_args()
    lines = [
        "| budget | splitrun's plan | splitrun | accelerate, device_map auto, bf16 | decode |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    with tempfile.TemporaryDirectory() as folder:
        model, load = model_of(args.model, folder)
        for budget in args.budgets.split(","):
            pair = compare(model, load, budget, args)
            lines.append(pair.row())
            print(lines[-1], flush=True)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", "utf-8")


def compare(model: str, load: Load, budget: str, args: argparse.Namespace) -> Pair:
    """Plan and run both under one budget."""
    memory = {args.card: budget, "cpu": args.host} if args.card else {"cpu": budget}
    shown = ", ".join(f"{name} {size}" for name, size in memory.items())
    context = args.prompt_tokens + args.new_tokens
    file = Path(tempfile.mkdtemp(), "placement.yaml")
    with contest.other_process() as process:
        try:
            placement = contest.plan_in(process, model, {"memory": memory, "context": context, "load": load})
            plan = "; ".join(f"{stage.device} {stage.units_text} {stage.weights}" for stage in placement.stages)
            refusal = ""
        except DoesNotFit as error:
            refusal, plan = str(error), "nothing fits"
            options = {"memory": {"cpu": "auto"}, "context": context, "load": load}
            placement = contest.plan_in(process, model, options)
    print(f"{shown}: {plan}", file=sys.stderr, flush=True)
    placement.save(file)
    terms = contest.make_terms(placement, file, args.prompt_tokens, args.new_tokens, 1, load)
    budgets = {name: parse_bytes(size) for name, size in memory.items()}
    terms = type(terms)(**{**terms.to_json(), "budgets": budgets})
    own, other = contest.hold(terms, ("accelerate",))
    return Pair(shown, refusal or plan, None if refusal else own, other)


if __name__ == "__main__":
    main()
