"""Do plans keep the memory they promise? Random budgets, each plan run in a process of its own, its peak measured.

    python tests/bench/budgets.py [--count 200] [--start 0] [--card cuda:0] [--seed 0] [--jobs 1]
        [--shape small|deepseek-1.5b] [-o FILE.json]

With --card, plans take turns on all cards that are there, which must be alike. Plans side by side (--jobs) wait for
each other's threads unless OMP_NUM_THREADS gives each its share of the cores.

For every budget the planner either makes a plan or refuses. A plan is run with its longest prompt and all its sessions,
a card's allocator held to the budget; no device's peak may exceed its budget, and what the plan expects must be within
5 % of it. A refusal must name the true shortfall: with that much more the planner finds a plan, with 2 % less than that
it does not. Virtual processors are threads of one process and counted together. Ends with one JSON line; status 1
when anything fails. Cases that FILE.json holds already count too, so that a long run may be made in pieces (--start).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import destinations

from splitrun.__main__ import SPINS

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # as every command does, before torch is imported

import torch
from shapes import DEFAULT, SHAPES
from turns import Turns

from splitrun.api import gather_facts
from splitrun.bench import contest
from splitrun.errors import DoesNotFit
from splitrun.planner.estimate import DeviceMemory
from splitrun.planner.facts import Workload
from splitrun.planner.facts_file import Facts
from splitrun.planner.memory import placement_memory
from splitrun.planner.placement import Placement
from splitrun.planner.seconds import interpolated
from splitrun.planner.solve import solve

SMALL = SHAPES[DEFAULT] | {
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WITHIN = 0.05
CARDS: SimpleQueue[int] = SimpleQueue()
"""Cards that no plan runs on: what the driver tells of a card is true of one process at a time."""
SCARCER = 0.02
"""A refusal that names the true shortfall still refuses with this share of it less."""


@dataclass(frozen=True)
class Case:
    """One question: budgets in bytes, and what must fit."""

    number: int
    budgets: Mapping[str, int]
    context: int
    sessions: int
    weights: str


@dataclass(frozen=True)
class Outcome:
    """What came of it. ``fault`` is what is wrong, empty when all is well; ``stages`` is the plan in words."""

    case: Case
    fault: str = ""
    stages: str = ""
    shortfall: Mapping[str, int] | None = None
    expected: Mapping[str, int] | None = None
    peak: Mapping[str, int] | None = None
    error: float = 0.0


def cases(facts: Facts, count: int, seed: int, card: str | None) -> list[Case]:
    """Budgets from hopeless to ample around what the model takes."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        weights = draw.choice(("auto", "bf16", "int8", "nf4"))
        context, sessions = draw.choice(((512, 1), (512, 4), (1024, 1), (1024, 2), (2048, 1), (2048, 2), (4096, 1)))
        size = sum(unit.weight_bytes["nf4" if weights == "auto" else weights] for unit in facts.profile.units)
        names = ["cpu"] if card is None and draw.random() < 0.6 else ["cpu", card or "cpu:1"]
        shares = [draw.uniform(0.1, 1.5) for _ in names]
        fixed = {device.name: device.context_bytes for device in facts.cluster.devices}
        if card is not None and number % 3:  # else main memory has no room for a card's process, or not for the model
            fixed["cpu"] += facts.cluster.card_process_bytes
        budgets = {
            name: fixed[name] + int(size * share) + draw.randrange(16 << 20, 96 << 20)
            for name, share in zip(names, shares, strict=True)
        }
        found.append(Case(number, budgets, context, sessions, weights))
    return found


def plan(facts: Facts, case: Case, budgets: Mapping[str, int]) -> Placement:
    """The plan for those budgets; raises DoesNotFit."""
    devices = tuple(
        replace(device, budget_bytes=budgets[device.name]) for device in facts.cluster.devices if device.name in budgets
    )
    workload = Workload(context=case.context, sessions=case.sessions)
    return solve(facts.profile, replace(facts.cluster, devices=devices), workload, case.weights)


def judge(facts: Facts, case: Case) -> Outcome:
    """Plan, then run it or test the refusal."""
    try:
        placement = plan(facts, case, case.budgets)
    except DoesNotFit as error:
        return judge_refusal(facts, case, error.shortfall_bytes)
    return judge_run(facts, case, placement)


def judge_refusal(facts: Facts, case: Case, shortfall: Mapping[str, int]) -> Outcome:
    """With the shortfall there is a plan, with a little less than it there is none."""
    told = {name: size for name, size in shortfall.items() if size}
    if not told:
        return Outcome(case, "refused without a shortfall")
    weights = "nf4" if case.weights == "auto" else case.weights
    case = replace(case, weights=weights)

    def fits(part: float) -> bool:
        more = {name: size + int(told.get(name, 0) * part) for name, size in case.budgets.items()}
        try:
            plan(facts, case, more)
        except DoesNotFit:
            return False
        return True

    fault = "" if fits(1.0) else "the shortfall is not enough"
    return Outcome(case, fault or ("less than the shortfall is enough" if fits(1 - SCARCER) else ""), "", told)


def judge_run(facts: Facts, case: Case, placement: Placement) -> Outcome:
    """Run the plan and compare what it took."""
    assert placement.estimate is not None
    expected = expected_bytes(facts, placement)
    budgets: dict[str, int] = {}
    for bill in placement.estimate.devices:
        pool = "cpu" if bill.device.startswith("cpu") else bill.device
        budgets[pool] = budgets.get(pool, 0) + bill.budget_bytes
    if "cpu" not in placement.device_names and "cpu" in expected:  # the process is there all the same
        expected["cpu"] += facts.cluster.device("cpu").context_bytes
        budgets["cpu"] += facts.cluster.device("cpu").context_bytes
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "placement.yaml")
        placement.save(file)
        terms = contest.make_terms(placement, file, 1, 2, 1, "dummy")
        runner = Turns()  # before it waits for a card
        card = CARDS.get() if any(device.startswith("cuda") for device in placement.device_names) else None
        try:
            start_bytes = runner.load(terms, card)
            runner.rounds(case.context - 8, 8, case.sessions)
            runner.round(case.context - 8, 8)
            peak = {name: size for name, size in runner.peak_bytes().items() if name in expected}
        finally:
            runner.close()
            if card is not None:
                CARDS.put(card)
    if "cpu" in peak:
        peak["cpu"] += start_bytes
    over = [name for name, size in peak.items() if size > budgets[name]]
    errors = {name: expected[name] / size - 1 for name, size in peak.items()}
    worst = max(errors.values(), key=abs)
    fault = f"exceeds the budget of {over[0]}" if over else ""
    if not fault and abs(worst) > WITHIN:
        fault = f"expected {worst:+.1%} of the peak"
    stages = ", ".join(f"{stage.device} {stage.units_text} {stage.weights}" for stage in placement.stages)
    return Outcome(case, fault, stages, None, expected, peak, worst)


def expected_bytes(facts: Facts, placement: Placement) -> dict[str, int]:
    """Device -> what the plan expects to be taken, processors together as "cpu".

    Each must have room for all that it takes when it is alone. In one process they load one after the other, before any
    computes; then there is the largest workspace of them, and of the others what the C library keeps for each thread, a
    chunk's temporaries: what a history takes is given back at once.
    """
    assert placement.estimate is not None
    bills = placement.estimate.devices
    expected = {bill.device: bill.expected_bytes for bill in bills if not bill.device.startswith("cpu")}
    workers = [bill for bill in bills if bill.device.startswith("cpu")]
    if workers:
        loaded = {
            key: tuple(replace(peak, load_bytes=0) for peak in found) for key, found in facts.profile.peaks.items()
        }
        again = placement_memory(replace(facts.profile, peaks=loaded), facts.cluster, placement)
        computing = {bill.device: bill.workspace_bytes for bill in again}
        kept = {bill.device: min(computing[bill.device], kept_bytes(facts, placement, bill)) for bill in workers}
        most = max(sum(kept.values()) - kept[name] + computing[name] for name in kept)
        most = max(most, *(bill.workspace_bytes for bill in workers))
        expected["cpu"] = sum(bill.expected_bytes - bill.workspace_bytes for bill in workers) + most
    return expected


def kept_bytes(facts: Facts, placement: Placement, bill: DeviceMemory) -> int:
    """A processor's temporaries of the first chunk of a prompt, which its thread keeps; all where none was measured."""
    tokens = min(placement.workload.chunk_tokens, placement.workload.context)
    found = [0]
    for stage in (stage for stage in placement.stages if stage.device == bill.device):
        peaks = facts.profile.peaks.get((stage.device, stage.weights))
        if peaks is None:
            return bill.workspace_bytes
        found += [round(interpolated(peaks[unit].chunks, tokens)) for unit in stage.units]
    return max(found)


def main() -> None:
    """Judge every case and say what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--start", type=int, default=0, help="the first case to run; those before it are skipped")
    parser.add_argument("--only", type=int, nargs="+", help="the numbers of the cases to run, instead of all")
    parser.add_argument("--card")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shape", choices=("small", "deepseek-1.5b"), default="small")
    parser.add_argument("--jobs", type=int, default=1, help="plans that run side by side, each in its process")
    parser.add_argument("-o", "--output", type=destinations.file)
    args = parser.parse_args()
    rows = earlier_rows(args.output)
    for card in range(torch.cuda.device_count()):
        CARDS.put(card)
    with tempfile.TemporaryDirectory() as folder:
        shape = SMALL if args.shape == "small" else SHAPES[args.shape]
        Path(folder, "config.json").write_text(json.dumps(shape))
        memory: dict[str, str | int] = {"cpu": "auto", args.card or "cpu:1": "auto"}
        facts = gather_facts(
            folder, memory, "auto", None, "dummy", (1, 2, 4), report=lambda text: print(text, flush=True)
        )
        wanted = cases(facts, args.start + args.count, args.seed, args.card)[args.start :]
        wanted = [case for case in wanted if not args.only or case.number in args.only]
        with ThreadPoolExecutor(args.jobs) as pool:
            for outcome in pool.map(lambda case: judge(facts, case), wanted):
                rows[outcome.case.number] = asdict(outcome) | {"told": line(outcome)}
                print(line(outcome), flush=True)
                write(args.output, rows)
    result = summary(rows.values())
    print(json.dumps(result))
    sys.exit(bool(result["faults"]))


def earlier_rows(file: Path | None) -> dict[int, dict[str, Any]]:
    """Number -> outcome of the cases that the file has."""
    if file is None or not file.exists():
        return {}
    return {row["case"]["number"]: row for row in json.loads(file.read_text("utf-8"))["outcomes"]}


def write(file: Path | None, rows: Mapping[int, Mapping[str, Any]]) -> None:
    """The summary and all outcomes, after each one: a long run that is cut short is not lost. Also as FILE.md, to be
    read."""
    if file is None:
        return
    ordered = [rows[number] for number in sorted(rows)]
    found = summary(ordered)
    file.write_text(json.dumps(found | {"outcomes": ordered}, indent=1) + "\n", "utf-8")
    words = [word for word in sys.argv[1:] if not word.endswith(".json")]
    head = f"Made by `python tests/bench/budgets.py {' '.join(words)}`, in pieces."
    lines = ["# Budgets and what plans took", "", head, "", f"`{json.dumps(found)}`", "", "```"]
    told = [*lines, *(str(row["told"]) for row in ordered), "```", ""]
    file.with_suffix(".md").write_text("\n".join(told), "utf-8")


def summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts and errors."""
    rows = list(rows)
    errors = sorted(abs(row["error"]) for row in rows if row["peak"])
    return {
        "cases": len(rows),
        "ran": len(errors),
        "refused": len(rows) - len(errors),
        "faults": sum(bool(row["fault"]) for row in rows),
        "median_error": round(errors[len(errors) // 2], 4) if errors else None,
        "worst_error": round(errors[-1], 4) if errors else None,
    }


def line(outcome: Outcome) -> str:
    """One case in words."""
    case = outcome.case
    budgets = ", ".join(f"{name} {size >> 20}" for name, size in case.budgets.items())
    told = f"{case.number:3} {case.weights:4} {case.context} x {case.sessions}, MiB: {budgets};"
    if outcome.peak:
        peaks = ", ".join(f"{name} {size >> 20}" for name, size in outcome.peak.items())
        expected = ", ".join(str(size >> 20) for size in (outcome.expected or {}).values())
        told += f" {outcome.stages}: expected {expected}, took {peaks}"
        told += f" ({outcome.error:+.1%})"
    elif outcome.shortfall:
        told += f" refused, short of {', '.join(f'{name} {size >> 20}' for name, size in outcome.shortfall.items())}"
    return told + (f": {outcome.fault.upper()}" if outcome.fault else "")


if __name__ == "__main__":
    main()
