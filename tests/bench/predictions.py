"""Predicted against measured, for several placements of one model: the table that the planner is judged by.

    python tests/bench/predictions.py MODEL [--formats bf16,int8=24/16,nf4] [--every] [--contexts 128,512]
        [--cuts 0,4,28] [--card cuda:0] [-o FOLDER]

MODEL is a directory whose config.json is enough, or "deepseek-1.5b" for that shape: weights are random. The cut is the
first layer on a second device (``cpu:1``, or the card named with --card); 0 puts every layer there, the last leaves
all on ``cpu``. Formats take turns over the cuts, or with --every each is run at each cut; one that names cuts of its
own (``nf4=28/20``) is run at those.

A machine's memory is shared: what it reads in a second changes by half from one minute to the next. So the units are
timed again after every round of a placement, each while nothing else wants the processor, and medians are compared. A
round is two requests, of which the second counts: prediction and figure are of requests in a row, since what silence
costs is a matter of what others on the machine do meanwhile.
The folder gets ``NAME.md`` and ``NAME.json`` after every placement; lines for placements that are in the JSON already
replace those, and the commands of all runs are named.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import destinations

from splitrun.__main__ import SPINS

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # as every command does, before torch is imported

from calm import Calm
from shapes import model_of
from turns import Turns

from splitrun.bench import contest
from splitrun.bench.terms import Round
from splitrun.engine.own_seconds import engine_cost
from splitrun.measure.cache import Cache
from splitrun.measure.engine_cost import with_engine
from splitrun.measure.probe import probe, this_machine
from splitrun.measure.profile import profile
from splitrun.measure.timing import Sample, Setting, UnitBench
from splitrun.measure.unit_seconds import Wanted, measure
from splitrun.measure.unit_steps import Point
from splitrun.model.cut import CutRange
from splitrun.model.files import ModelFiles, resolve
from splitrun.model.structure import ModelStructure, inspect
from splitrun.planner.cost import estimate
from splitrun.planner.facts import ModelProfile, Workload
from splitrun.planner.placement import ModelRef, Placement, StageSpec


@dataclass(frozen=True)
class Line:
    """One placement's figures for one context: tokens per second and seconds to the first token."""

    placement: str
    weights: str
    cut: int
    prompt: int
    predicted_decode: float
    measured_decode: float
    predicted_first_s: float
    measured_first_s: float

    @property
    def errors(self) -> tuple[float, float]:
        """Relative, of both."""
        decode = self.predicted_decode / self.measured_decode - 1
        return decode, self.predicted_first_s / self.measured_first_s - 1

    @property
    def key(self) -> tuple[str, str, int]:
        """What was run."""
        return self.placement, self.weights, self.prompt


class Benches:
    """Benches that stay loaded while the format stays the same; ``spend_s`` is what one kind of step takes."""

    def __init__(self, spend_s: float) -> None:
        self._spend_s = spend_s
        self._open: dict[tuple[CutRange, Setting], KeptBench] = {}
        self.told_of: set[tuple[str, ...]] = set()

    def open(
        self, config: Any, structure: ModelStructure, cut: CutRange, setting: Setting, points: Sequence[Point]
    ) -> UnitBench:
        """The bench, loaded now or earlier."""
        if (cut, setting) not in self._open:
            bench = self._open[cut, setting] = KeptBench(config, structure, cut, setting, points)
            bench.spend_s = self._spend_s
        return self._open[cut, setting]

    def close(self) -> None:
        """Give all their memory back."""
        for bench in self._open.values():
            bench.end()
        self._open.clear()


class KeptBench(UnitBench):
    """Times each point briefly, and outlives the one who asked."""

    spend_s = 0.25

    def time(self, points: Sequence[Point], spend_s: float | None = None, peaks: bool = False) -> dict[Point, Sample]:
        """As `UnitBench.time`."""
        return super().time(points, self.spend_s, peaks)

    def close(self) -> None:
        """Stay open."""

    def end(self) -> None:
        """Close."""
        super().close()


@dataclass(frozen=True)
class Subject:
    """The model, as every line needs it."""

    files: ModelFiles
    structure: ModelStructure
    facts: ModelProfile
    contexts: tuple[int, ...]
    new_tokens: int
    turns: int
    calm: Calm


def place(subject: Subject, cut: int, weights: str, other: str) -> Placement:
    """Everything before ``cut`` on the CPU, the rest elsewhere; the whole on the CPU when the cut is the last."""
    layers, workload = subject.structure.layers, Workload(context=max(subject.contexts))
    if cut >= layers:
        stages: tuple[StageSpec, ...] = (StageSpec("cpu", True, (0, layers), True, weights),)
    else:
        stages = (
            StageSpec("cpu", True, (0, cut), False, weights),
            StageSpec(other, False, (cut, layers), True, weights),
        )
    return Placement(1, ModelRef(str(subject.files.path), layers=layers), workload, stages)


def compare(subject: Subject, cut: int, weights: str, other: str, benches: Benches) -> list[Line]:
    """Run a placement in turns with the measuring of its units: one line per context."""
    placement = place(subject, cut, weights, other)
    cluster = probe(dict.fromkeys(placement.device_names, "auto"))
    cost = engine_cost(this_machine().cache)
    cluster = with_engine(cluster, replace(cost, request_s=cost.next_request_s))
    wanted = Wanted(dict.fromkeys(placement.device_names, (weights,)), rows=(1,))
    foretold: dict[int, list[tuple[float, float]]] = {context: [] for context in subject.contexts}
    found: dict[int, list[tuple[float, float]]] = {context: [] for context in subject.contexts}

    def foretell() -> dict[int, tuple[float, float]]:
        with tempfile.TemporaryDirectory() as folder:
            kept = Cache(Path(folder))
            timed = measure(
                subject.files, subject.structure, subject.facts, cluster, wanted, kept, open_bench=benches.open
            )
        figures = {}
        for context in subject.contexts:
            prompt = context - subject.new_tokens
            workload = replace(
                placement.workload, history_tokens=prompt + subject.new_tokens // 2, prompt_tokens=prompt
            )
            made = estimate(timed, cluster, replace(placement, workload=workload))
            figures[context] = made.step_s, made.time_to_first_token_s
        return figures

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "placement.yaml")
        placement.save(file)
        runner = Turns()
        try:
            runner.load(contest.make_terms(placement, file, 1, subject.new_tokens, 1, "dummy"))
            ours = (runner.process,)
            for context in sorted(subject.contexts, reverse=True):  # a longer one would have graphs captured anew
                runner.round(context - subject.new_tokens, 2)
            if placement.device_names not in benches.told_of:
                foretell()
                benches.told_of.add(placement.device_names)
            for _ in range(subject.turns):
                for context in subject.contexts:
                    round_ = subject.calm(partial(in_a_row, runner, context, subject.new_tokens), ours)
                    step_s = (round_.last_s - round_.first_s) / (round_.tokens - 1)
                    found[context].append((step_s, round_.first_s))
                for context, figures in subject.calm(foretell, ours).items():
                    foretold[context].append(figures)
        finally:
            runner.close()
    if os.environ.get("SHOW"):
        for context in subject.contexts:
            print(
                context,
                [[f"{v * 1e3:.1f}" for v, _ in x[context]] for x in (foretold, found)],
                [[f"{v:.3f}" for _, v in x[context]] for x in (foretold, found)],
                file=sys.stderr,
            )
    name = " + ".join(f"{stage.device}: {stage.units_text}" for stage in placement.stages)
    lines = []
    for context in subject.contexts:
        (step_s, first_s), (real_step_s, real_first_s) = middle(foretold[context]), middle(found[context])
        prompt = context - subject.new_tokens
        lines.append(Line(name, weights, cut, prompt, 1 / step_s, 1 / real_step_s, first_s, real_first_s))
    return lines


def in_a_row(runner: Turns, context: int, new_tokens: int) -> Round:
    """A round right behind another one."""
    runner.round(context - new_tokens, 2)
    return runner.round(context - new_tokens, new_tokens)


def middle(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The medians."""
    return median(pair[0] for pair in pairs), median(pair[1] for pair in pairs)


def row(line: Line) -> str:
    """One line of the table."""
    decode, first = line.errors
    return (
        f"| {line.placement} | {line.weights} | {line.prompt} | {line.predicted_decode:.1f} | "
        f"{line.measured_decode:.1f} | {decode:+.1%} | {line.predicted_first_s:.3f} | {line.measured_first_s:.3f} | "
        f"{first:+.1%} |"
    )


def table(title: str, lines: Sequence[Line]) -> str:
    """The lines under a head, and the errors in short."""
    head = (
        "| placement | weights | prompt | tok/s predicted | measured | error | first token s predicted | measured "
        "| error |\n|---|---|---|---|---|---|---|---|---|"
    )
    decode = sorted(abs(line.errors[0]) for line in lines)
    first = sorted(abs(line.errors[1]) for line in lines)
    short = (
        f"{len(lines)} runs of {len({line.key[:2] for line in lines})} placements. Decode: median error "
        f"{median(decode):.1%}, worst {decode[-1]:.1%}. First token: median {median(first):.1%}, worst {first[-1]:.1%}."
    )
    return "\n".join([title, "", short, "", head, *map(row, lines), ""])


def main() -> None:
    """Print the lines as they come, and write the table where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--formats", default="bf16,int8,nf4")
    parser.add_argument("--every", action="store_true")
    parser.add_argument("--contexts", default="128,512")
    parser.add_argument("--cuts", default="")
    parser.add_argument("--card", default="cpu:1")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--spend", type=float, default=0.25, help="seconds on one kind of step, each time it is timed")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait, in all, for others to be idle")
    parser.add_argument("--name", default="predictions")
    parser.add_argument("--remark", default="", help="what else to know of how the lines came about")
    parser.add_argument("-o", "--output", type=destinations.folder)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = resolve(model_of(args.model, folder)[0], weights=False)
        structure = inspect(files.config)
        contexts = tuple(int(text) for text in args.contexts.split(","))
        facts, calm = profile(files, structure), Calm(args.patience)
        subject = Subject(files, structure, facts, contexts, args.new_tokens, args.turns, calm)
        cuts = [int(cut) for cut in args.cuts.split(",") if cut] or [*range(0, structure.layers, 4), structure.layers]
        for lines in run_all(subject, cuts, args.formats.split(","), args.every, args.card, args.spend):
            if args.output:
                write(args.output, args.name, args.card, lines, args.remark)


def run_all(
    subject: Subject, cuts: Sequence[int], formats: Sequence[str], every: bool, other: str, spend_s: float
) -> Iterator[list[Line]]:
    """All lines so far, after each placement; format by format, so that benches are loaded once for each."""
    lines: list[Line] = []
    for number, format_ in enumerate(formats):
        weights, _, own = format_.partition("=")
        benches = Benches(spend_s)
        for index, cut in enumerate(map(int, own.split("/")) if own else cuts):
            if every or own or index % len(formats) == number:
                new = compare(subject, cut, weights, other, benches)
                print("\n".join(map(row, new)), flush=True)
                lines += new
                yield lines
        benches.close()


def write(folder: Path, name: str, card: str, lines: Sequence[Line], remark: str) -> None:
    """The table and its JSON; earlier lines of the file that were not run again stay."""
    file = folder / f"{name}.json"
    before = json.loads(file.read_text("utf-8")) if file.exists() else {}
    merged = {line.key: line for line in (*(Line(**line) for line in before.get("lines", ())), *lines)}
    order = sorted(merged.values(), key=lambda line: (line.weights, line.cut, line.prompt))
    devices = probe(dict.fromkeys(("cpu", card), "auto")).devices
    machine = ", ".join(f"{device.name}: {device.description}" for device in devices)
    command = f"python tests/bench/predictions.py {shlex.join(sys.argv[1:])}"
    commands = [*(other for other in before.get("commands", ()) if other != command), command]
    remark = remark or before.get("remark", "")
    made = "\n".join(f"    {command}" for command in commands)
    title = f"# Predicted against measured\n\nMade on {machine} by\n\n{made}" + f"\n\n{remark}" * bool(remark)
    content = {"commands": commands, "remark": remark, "machine": machine, "lines": [asdict(line) for line in order]}
    file.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    (folder / f"{name}.md").write_text(table(title, order), "utf-8")


if __name__ == "__main__":
    main()
