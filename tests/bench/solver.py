"""How long planning takes: the search alone, a plan with all that is said about it, and ``splitrun plan`` as a command.

    python tests/bench/solver.py [MODEL] [--repeat 3] [-o FILE.md]

The problems are made of numbers: layers, devices whose speeds and budgets all differ, formats; "quality" is what a
search takes that has to keep within half of what nf4 loses. With MODEL ("demo", a directory, or "deepseek-1.5b" for
that shape without weights) the command is run twice: with nothing known of this machine, and again with what the first
run kept; what a process takes for its imports alone is taken off.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import destinations
from shapes import model_of

from splitrun.measure.host import allowed_processors, read_file, read_processor
from splitrun.planner.facts import FORMATS, Cluster, Device, KVGroup, ModelProfile, UnitProfile, Workload
from splitrun.planner.formats import device_formats
from splitrun.planner.search import fastest
from splitrun.planner.solve import solve
from splitrun.planner.tables import build_tables

MIB = 1 << 20
BITS = {"fp32": 32.0, "bf16": 16.0, "fp16": 16.0, "int8": 8.0, "nf4": 4.25}
PROBLEMS = (
    ("80 layers, 4 devices, 3 formats", 80, 4, False, "auto", 0.1),
    ("126 layers, 8 different devices", 126, 8, False, "nf4", 5.0),
    ("126 layers, 17 devices, 16 of a kind", 126, 17, True, "nf4", 5.0),
)
"""Name, layers, devices, whether all but the first are alike, formats, and the seconds wanted."""
USES = (("3 cards that take main memory", 1.0), ("3 slow ones beside a large processor", 0.1))
"""The first again where cards in use take main memory, and how quick they are. Where a plan without layers on cards may
be the best it is searched for too: for ends on cards, and for no card.
"""
MOST_WITHIN = 500
"""Layers times devices up to which keeping within a quality is timed too."""
IMPORTS = "import splitrun.api, splitrun.measure.gather, splitrun.engine.own_seconds, transformers.modeling_utils"


def model(layers: int, values: int = 400 * MIB) -> ModelProfile:
    """A dense model of equal layers, stored in bf16."""

    def unit(name: str, share: float = 1.0) -> UnitProfile:
        sizes = {weights: int(values * BITS[weights] / 8) for weights in FORMATS}
        reads = {weights: int(size * share) for weights, size in sizes.items()}
        kept = {"full": 2048} if name.startswith("layer") else {}
        return UnitProfile(name, sizes, reads, 2.0 * values * share, kept, quantized_values=values)

    units = (unit("embed", 1e-4), *(unit(f"layer {index}") for index in range(layers)), unit("head"))
    return ModelProfile("numbers", None, "", "llama", units, (KVGroup("full"),), 8192, 128_000, 131_072, "bf16")


def machine(devices: int, layers: int, alike: bool) -> Cluster:
    """A processor and cards that together hold about twice the model in nf4."""
    share = int(2 * layers * 400 * MIB * BITS["nf4"] / 8 / devices)

    def place(number: int) -> Device:
        name, step = ("cpu", 0) if number == 0 else (f"cuda:{number - 1}", 1 if alike else number)
        budget = share * (8 + step % 5) // 8
        bandwidth, flops = (40e9, 1e12) if number == 0 else ((200 + 37 * step) * 1e9, (10 + 3 * step) * 1e12)
        sizes = (2 * budget, budget, budget)
        return Device(name, "cuda" if number else "cpu", name, *sizes, name, 300 * MIB, bandwidth, flops, 1e-4, "bf16")

    return Cluster(tuple(place(number) for number in range(devices)))


def paying(cluster: Cluster, speed: float) -> Cluster:
    """The same, where a card in use takes main memory, and layers on it take more; slow cards beside a processor that
    has room for the whole model."""
    processor, *cards = cluster.devices
    if speed < 1:
        processor = replace(processor, budget_bytes=6 * processor.budget_bytes)
        cards = [replace(card, bandwidth_bytes_per_s=speed * card.bandwidth_bytes_per_s) for card in cards]
    return replace(cluster, devices=(processor, *cards), card_process_bytes=300 * MIB, card_layers_bytes=200 * MIB)


def seconds(run: Callable[[], object], repeat: int) -> float:
    """The median."""
    taken = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return median(taken)


def problem(
    name: str, layers: int, count: int, alike: bool, weights: str, wanted_s: float, repeat: int, speed: float = 0.0
) -> str:
    """Both objectives of one problem as lines of the table; with ``speed`` cards in use take main memory."""
    profile, cluster = model(layers), machine(count, layers, alike)
    lines = []
    if speed:
        cluster = paying(cluster, speed)
    for workload in (Workload(), Workload(sessions=4, objective="throughput")):
        formats = device_formats(profile, cluster, weights)
        bottleneck = workload.objective == "throughput"

        def search() -> object:
            return fastest(build_tables(profile, cluster, formats, workload), bottleneck)  # noqa: B023  called at once

        def whole() -> object:
            return solve(profile, cluster, workload, weights, stream=not speed)  # noqa: B023

        def within() -> object:
            return solve(profile, cluster, workload, quality="0.5", stream=True)  # noqa: B023

        figures = [f"{seconds(run, repeat):.3f} s" for run in (search, whole)]
        figures.append(f"{seconds(within, 1):.3f} s" if layers * count <= MOST_WITHIN else "–")
        lines.append(f"| {name} | {workload.objective} | {wanted_s:g} s | {' | '.join(figures)} |")
    return "\n".join(lines)


def command(model: str) -> str:
    """``splitrun plan`` with an empty cache, and again."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"SPLITRUN_CACHE": folder, "XDG_CACHE_HOME": folder}
        named, load = model_of(model, folder)
        words = [sys.executable, "-m", "splitrun", "plan", named, "--load", load]

        def run(*command: str) -> float:
            start = time.perf_counter()
            subprocess.run(command, env=environment, check=True, capture_output=True)
            return time.perf_counter() - start

        first, second, bare = run(*words), run(*words), run(sys.executable, "-c", IMPORTS)
    return (
        f"`splitrun plan`, {Path(model).name}: the first time {first:.1f} s (60 wanted), again {second:.1f} s, "
        f"{second - bare:.1f} s of that beyond imports (1 wanted)"
    )


def processor() -> str:
    """What this machine computes with."""
    found = read_processor(read_file, allowed_processors())
    return f"{found.name}, {found.cores} cores"


def main() -> None:
    """Print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("-o", "--output", type=destinations.file)
    args = parser.parse_args()
    head = ["| problem | objective | wanted | search | with all that is said | quality |", "|---|---|---|---|---|---|"]
    lines = list(head)
    print("\n".join(lines))
    for each in PROBLEMS:
        lines.append(problem(*each, args.repeat))
        print(lines[-1], flush=True)
    _, *first = PROBLEMS[0]
    for name, speed in USES:
        lines.append(problem(f"80 layers, 4 devices, {name}", *first, args.repeat, speed))
        print(lines[-1], flush=True)
    if args.model:
        lines += ["", command(args.model)]
        print(lines[-1])
    if args.output:
        made = (
            f"# How long planning takes\n\nMade by `python tests/bench/solver.py {args.model or ''}` on {processor()}."
        )
        args.output.write_text("\n".join([made, "", *lines, ""]), "utf-8")


if __name__ == "__main__":
    main()
