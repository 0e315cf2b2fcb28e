"""What it costs to have two stages in two processes: the same split in one process beside it, in one run.

    python tests/bench/two_processes.py MODEL [--weights nf4] [--tokens 64] [--rounds 3]

MODEL is a directory (a config suffices: weights are random). Both engines are loaded in turn and decode one stream
with the same threads; the rest is the hop, there and back. Prints the median ms per token of both, their difference,
whether that is within a tenth of one process and two hops of HOP_MS, and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from itertools import pairwise

os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import splitrun
from splitrun.measure.host import read_processor
from splitrun.model.files import resolve
from splitrun.planner.facts import Workload
from splitrun.planner.placement import ModelRef, Placement, StageSpec

HOP_MS = 0.4


def placement(model: str, weights: str, second: str) -> Placement:
    """Half of the layers on the processor here, half on ``second``, each stage with all cores in its turn."""
    layers = int(resolve(model, weights=False).config.get_text_config(decoder=True).num_hidden_layers)
    cores = read_processor().cores
    stages = (
        StageSpec("cpu", True, (0, layers // 2), False, weights, threads=cores),
        StageSpec(second, False, (layers // 2, layers), True, weights, threads=cores),
    )
    return Placement(1, ModelRef(model, layers=layers), Workload(1024), stages)


def ms_per_token(model: str, weights: str, second: str, tokens: int) -> float:
    """The median time between the tokens of one stream, after one to warm up."""
    sampling = splitrun.SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    with splitrun.Engine(placement(model, weights, second), load="dummy") as engine:
        for _ in range(2):
            times = [time.perf_counter() for event in engine.stream([5] * 100, sampling) if event.token_id is not None]
    return statistics.median(second - first for first, second in pairwise(times)) * 1e3


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--weights", default="nf4")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rounds = []
    for _ in range(options.rounds):  # in turn, so that a busy machine counts on both sides
        second = ("cpu:1", "process/cpu")
        sides = [ms_per_token(options.model, options.weights, name, options.tokens) for name in second]
        rounds.append(sides)
        print(f"one process {sides[0]:.2f} ms a token, two {sides[1]:.2f} ms", flush=True)
    one, two = (statistics.median(times) for times in zip(*rounds, strict=True))
    print(f"one process {one:.2f} ms a token, two {two:.2f} ms: {two - one:+.2f} ms, {two / one - 1:+.1%}")
    allowed = (one + 2 * HOP_MS) * 1.1
    print(f"allowed {allowed:.2f} ms: {'kept' if two <= allowed else 'missed'}")
    figures = {"one_ms": one, "two_ms": two, "allowed_ms": allowed, "ratio": two / one}
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
