"""Every operator of the processor kernels: gigabytes a second, and their share of a plain read in the same run.

    python tests/bench/operators.py [--threads N] [--level avx2] [--seconds S]

Weights are larger than the caches together. Each operator runs in turn with a plain read of as much memory; the share
is the median of the pairs' ratios, so that a busy neighbour, who slows both, moves it little.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

from splitrun.kernels.cpu.arena import ARENA
from splitrun.kernels.cpu.library import Kernel, kernel, levels
from splitrun.kernels.cpu.tiled import TiledWeight

SHAPE = (8960, 1536)
MATRICES = 24
ROWS = (1, 2, 4, 8, 16)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(
    name: str, run: Callable[[], object], nbytes: int, read: Callable[[], object], read_bytes: int, spend_s: float
) -> None:
    run()
    read()
    own, plain = [], []
    until = time.perf_counter() + spend_s
    while len(own) < 3 or time.perf_counter() < until:
        own.append(seconds(run))
        plain.append(seconds(read))
    share = (
        nbytes / read_bytes * statistics.median(reading / working for working, reading in zip(own, plain, strict=True))
    )
    median, best = nbytes / statistics.median(own) / 1e9, nbytes / min(own) / 1e9
    print(f"{name:32} {median:8.1f} {best:8.1f} {read_bytes / statistics.median(plain) / 1e9:10.1f} {share:8.2f}")


def matrices(format: str, level: Kernel) -> list[TiledWeight]:
    made = []
    for _ in range(MATRICES):
        weight = TiledWeight.empty(format, SHAPE, torch.bfloat16, level)
        weight.codes.random_(0, 255)
        weight.scales.uniform_(0.01, 0.1)
        made.append(weight)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--level", choices=list(levels()), default=None)
    parser.add_argument("--seconds", type=float, default=1.0, help="spent on each operator")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    level = levels()[options.level] if options.level else kernel()
    if level is None:
        sys.exit("no kernel runs here: install a C compiler and splitrun again")
    print(f"{level.name}, {options.threads} threads, {MATRICES} matrices of {SHAPE[0]} x {SHAPE[1]}, bf16 activations")
    print(f"{'operator':32} {'GB/s':>8} {'best':>8} {'read GB/s':>10} {'share':>8}")
    for format in ("nf4", "int8"):
        weights = matrices(format, level)
        nbytes = sum(weight.nbytes for weight in weights)
        memory = ARENA.empty(nbytes // 4096 * 4096, torch.uint8).fill_(1)

        def read(memory: torch.Tensor = memory) -> None:
            level.read(memory)

        for rows in ROWS:
            x = torch.randn(rows, SHAPE[1]).bfloat16()

            def multiply(weights: list[TiledWeight] = weights, x: torch.Tensor = x) -> None:
                for weight in weights:
                    weight.apply(x)

            compare(f"{format} product, {rows} rows", multiply, nbytes, read, memory.nbytes, options.seconds)
        values = torch.empty(SHAPE, dtype=torch.bfloat16)

        def dequantize(weights: list[TiledWeight] = weights, values: torch.Tensor = values) -> None:
            for weight in weights:
                level.values(weight.matrix, 0, values)

        compare(
            f"{format} values to bf16, written", dequantize, nbytes + MATRICES * values.nbytes, read, memory.nbytes, 1.0
        )
        del weights, memory


if __name__ == "__main__":
    main()
