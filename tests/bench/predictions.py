"""Predicted against measured, for several placements of one model: the table that the planner is judged by.

    python tests/bench/predictions.py MODEL [--formats bf16,int8,nf4] [--contexts 256,2048] [--cuts 0,8,28] [-o FILE]

MODEL needs only its config: weights are random. Each line measures the units just before and just after the placement
runs in a process of its own, so that a busy machine is about equally busy for both. The cut is the first layer
on a second worker (``cpu:1``, or the card named with --card); 0 puts every layer there, the last all on ``cpu``.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from splitrun.bench import contest
from splitrun.measure.cache import Cache
from splitrun.measure.probe import probe
from splitrun.measure.profile import profile
from splitrun.measure.unit_seconds import Wanted, measure
from splitrun.model.files import ModelFiles, resolve
from splitrun.model.structure import ModelStructure, inspect
from splitrun.planner.cost import estimate
from splitrun.planner.facts import Cluster, ModelProfile, Workload
from splitrun.planner.placement import ModelRef, Placement, StageSpec


@dataclass(frozen=True)
class Line:
    """One placement's figures: tokens per second and seconds to the first token."""

    name: str
    weights: str
    prompt: int
    predicted: tuple[float, float]
    measured: tuple[float, float]

    @property
    def errors(self) -> tuple[float, float]:
        """Relative, of both."""
        pairs = zip(self.predicted, self.measured, strict=True)
        decode, first = (predicted / found - 1 for predicted, found in pairs)
        return decode, first


def place(source: str, layers: int, cut: int, weights: str, context: int, other: str) -> Placement:
    """Everything before ``cut`` on the CPU, the rest elsewhere; the whole on the CPU when the cut is the last."""
    workload = Workload(context=context)
    if cut >= layers:
        stages: tuple[StageSpec, ...] = (StageSpec("cpu", True, (0, layers), True, weights),)
    else:
        stages = (
            StageSpec("cpu", True, (0, cut), False, weights),
            StageSpec(other, False, (cut, layers), True, weights),
        )
    return Placement(1, ModelRef(source, layers=layers), workload, stages)


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--formats", default="bf16,int8,nf4")
    parser.add_argument("--contexts", default="256,2048")
    parser.add_argument("--cuts", default="")
    parser.add_argument("--card", default="cpu:1")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--once", action="store_true", help="measure the units once, not before every run")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    files = resolve(arguments.model, weights=False)
    structure = inspect(files.config)
    facts = profile(files, structure)
    cuts = [int(cut) for cut in arguments.cuts.split(",") if cut] or [0, structure.layers // 2, structure.layers]
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for weights in arguments.formats.split(","):
            for cut in cuts:
                for context in map(int, arguments.contexts.split(",")):
                    placement = place(arguments.model, structure.layers, cut, weights, context, arguments.card)
                    cluster = probe(dict.fromkeys(placement.device_names, "auto"))
                    kept = Cache(Path(folder), refresh=not arguments.once)
                    line = compare(files, structure, facts, cluster, placement, kept, arguments.new_tokens)
                    lines.append(line)
                    print(row(line), flush=True)
    text = table(arguments.model, lines)
    print(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


def compare(
    files: ModelFiles,
    structure: ModelStructure,
    facts: ModelProfile,
    cluster: Cluster,
    placement: Placement,
    kept: Cache,
    count: int,
) -> Line:
    """Measure units, predict, run."""
    weights = placement.stages[0].weights
    prompt = placement.workload.context - count
    workload = replace(placement.workload, history_tokens=prompt + count // 2, prompt_tokens=prompt)
    wanted = Wanted(dict.fromkeys(placement.device_names, (weights,)), rows=(1,))

    def foretell() -> tuple[float, float]:
        timed = measure(files, structure, facts, cluster, wanted, kept)
        found = estimate(timed, cluster, replace(placement, workload=workload))
        return found.step_s, found.time_to_first_token_s

    before = foretell()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "placement.yaml")
        placement.save(file)
        terms = contest.make_terms(placement, file, prompt, count, 2, "dummy")
        (result,) = contest.hold(terms, ())
    if result.error:
        raise SystemExit(f"{placement.stages}: {result.error}")
    # A machine that others use is not equally busy before and after: what is foretold is the mean of both.
    after = foretell() if kept.refresh else before
    name = " + ".join(f"{stage.device}: {stage.units_text}" for stage in placement.stages)
    return Line(
        name,
        weights,
        prompt,
        (2 / (before[0] + after[0]), (before[1] + after[1]) / 2),
        (result.decode_tokens_per_s, result.ttft_s),
    )


def row(line: Line) -> str:
    """One line of the table."""
    decode, first = line.errors
    return (
        f"| {line.name} | {line.weights} | {line.prompt} | {line.predicted[0]:.2f} | {line.measured[0]:.2f} | "
        f"{decode:+.1%} | {line.predicted[1]:.3f} | {line.measured[1]:.3f} | {first:+.1%} |"
    )


def table(model: str, lines: list[Line]) -> str:
    """The lines under a head, and the errors in short."""
    head = (
        "| placement | weights | prompt | tok/s predicted | measured | error | first token | measured | error |"
        "\n|---|---|---|---|---|---|---|---|---|"
    )
    decode = sorted(abs(line.errors[0]) for line in lines)
    first = sorted(abs(line.errors[1]) for line in lines)
    short = (
        f"{len(lines)} placements of {Path(model).name}. Decode: median error {median(decode):.1%}, worst "
        f"{decode[-1]:.1%}. First token: median {median(first):.1%}, worst {first[-1]:.1%}."
    )
    return "\n".join([head, *map(row, lines), "", short, ""])


if __name__ == "__main__":
    main()
