"""Products of many rows, every kernel of this processor: GFLOP/s, share of the measured peak, ratio to torch in bf16.

    python tests/bench/prompts.py [--threads N] [--rows 512,64,17] [--seconds S] [--format nf4]

The peak is what the same instruction does on registers alone, on all threads, in the same run. torch multiplies the
same values kept in bf16, in turn with the kernel; "ratio" is the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from splitrun.kernels.cpu.library import kernel
from splitrun.kernels.cpu.many import ManyRows, every
from splitrun.kernels.cpu.selftest import first_fault_of_many
from splitrun.kernels.cpu.tiled import TiledWeight

SHAPES = ((8960, 1536), (1536, 8960), (2048, 1536))
"""Of the 1.5B shape: gate and up, down, and queries, keys and values."""


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak(many: ManyRows) -> float:
    """Operations a second on registers, best of several."""
    rounds, best = 20000, 0.0
    for _ in range(12):
        start = time.perf_counter()
        operations = many.spin(rounds)
        spent = time.perf_counter() - start
        best = max(best, operations / spent)
        rounds = max(rounds, int(rounds * 0.05 / spent))
    return best


def compare(many: ManyRows, weight: TiledWeight, rows: int, most: float, spend_s: float) -> None:
    outputs, columns = weight.shape
    x, values = torch.randn(rows, columns).bfloat16(), weight.dequantize()
    out = torch.empty(rows, outputs, dtype=torch.bfloat16)
    own, other = [], []
    until = time.perf_counter() + spend_s
    while len(own) < 4 or time.perf_counter() < until:
        own.append(seconds(lambda: many.product(weight.matrix, x, out)))
        other.append(seconds(lambda: functional.linear(x, values)))
    own, other = own[1:], other[1:]
    speed = 2 * rows * outputs * columns / statistics.median(own)
    ratio = statistics.median(theirs / ours for ours, theirs in zip(own, other, strict=True))
    exact = x.float() @ values.float().T
    error = ((out.float() - exact).norm() / exact.norm()).item()
    shape = f"{outputs} x {columns}"
    print(
        f"{many.name:18} {shape:14} {rows:5} {speed / 1e9:9.0f} {speed / most:8.2f} {ratio:8.2f} {error:8.2%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", default="512,64,17")
    parser.add_argument("--seconds", type=float, default=1.0, help="spent on each line")
    parser.add_argument("--format", choices=("nf4", "int8"), default="nf4")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    level, kernels = kernel(), every()
    if level is None or not kernels:
        sys.exit("no kernel for prompts runs here: it needs AVX2, and a C compiler at installation")
    print(f"{options.threads} threads, {options.format}")
    print(f"{'kernel':18} {'outputs':14} {'rows':>5} {'GFLOP/s':>9} {'of peak':>8} {'ratio':>8} {'error':>8}")
    for many in kernels.values():
        most, fault = peak(many), first_fault_of_many(many)
        print(f"{many.name:18} {'registers':14} {'':5} {most / 1e9:9.0f}   self-test: {fault or 'passed'}")
        for shape in SHAPES:
            weight = TiledWeight.empty(options.format, shape, torch.bfloat16, level)
            weight.store(0, torch.randn(shape) * 0.02)
            for rows in options.rows.split(","):
                compare(many, weight, int(rows), most, options.seconds)


if __name__ == "__main__":
    main()
