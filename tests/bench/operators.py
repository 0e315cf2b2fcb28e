"""Every operator of the processor kernels for few rows: gigabytes a second, and their share of a plain read.

    python tests/bench/operators.py [--threads N] [--level avx2] [--seconds S] [--only nf4]

Weights and KV are larger than the caches. Each operator runs in turn with a plain read of memory; the share is the
median of the pairs' ratios of bytes a second, so that a busy neighbour, who slows both, moves it little. Above a few
rows the products are bound by arithmetic: their GFLOP/s say more than the share. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from splitrun.kernels.cpu.arena import ARENA
from splitrun.kernels.cpu.block import BlockKernel, LayerChain, LayerParts, RowHistories
from splitrun.kernels.cpu.dense import DenseWeight
from splitrun.kernels.cpu.library import Kernel, kernel, levels
from splitrun.kernels.cpu.tiled import TiledWeight

HIDDEN, INNER, WIDTH, HEADS, KV_HEADS = 1536, 8960, 128, 12, 2
MATRICES, LAYERS = 16, 6
BLOCK_TOKENS = 64
ROWS = (1, 2, 4, 8, 16)
READ_BYTES = 1 << 28


@dataclass(frozen=True)
class Line:
    """One operator. ``share`` is of a plain read's bytes a second."""

    operator: str
    gigabytes_per_s: float
    gigaflops: float
    read_gigabytes_per_s: float
    share: float


@dataclass(frozen=True)
class Operator:
    """Something to time: what it must read at least, and how many operations it does."""

    name: str
    run: Callable[[], object]
    nbytes: int
    operations: int


def matrix(format: str, rows: int, columns: int, level: Kernel) -> TiledWeight | DenseWeight:
    if format == "bf16":
        values = ARENA.empty(rows * columns, torch.bfloat16).view(rows, columns)
        return DenseWeight(values.uniform_(-1, 1).mul_(columns**-0.5), level)
    weight = TiledWeight.empty(format, (rows, columns), torch.bfloat16, level)
    weight.codes.random_(0, 256)
    weight.scales.uniform_(0.5, 1.5).mul_(columns**-0.5).div_(1 if format == "nf4" else 127)
    return weight


def products(format: str, level: Kernel) -> Iterator[Operator]:
    weights = [matrix(format, INNER, HIDDEN, level) for _ in range(MATRICES)]
    nbytes = sum(weight.nbytes for weight in weights)
    for rows in ROWS:
        x = torch.randn(rows, HIDDEN).bfloat16()
        operations = 2 * rows * INNER * HIDDEN * MATRICES

        def multiply(x: Tensor = x) -> None:
            for weight in weights:
                weight.apply(x)

        yield Operator(f"{format} product, {rows} rows", multiply, nbytes, operations)
        if rows == 1:

            def choose(x: Tensor = x) -> None:
                for weight in weights:
                    weight.largest(x)

            yield Operator(f"{format} product and largest, 1 row", choose, nbytes, operations)
    if format != "bf16":
        values = torch.empty((INNER, HIDDEN), dtype=torch.bfloat16)

        def dequantize() -> None:
            for weight in weights:
                level.values(weight.matrix, 0, values)

        yield Operator(f"{format} values to bf16, written", dequantize, nbytes + MATRICES * values.nbytes, 0)


def layer_parts(format: str, hidden: int, inner: int, blocks: int, kv: torch.dtype, level: Kernel) -> LayerParts:
    heights = {"query": HEADS * WIDTH, "key": KV_HEADS * WIDTH, "value": KV_HEADS * WIDTH, "output": hidden}
    heights |= {"gate": inner, "up": inner, "down": hidden}
    columns = {"output": HEADS * WIDTH, "down": inner}
    shape = (blocks, KV_HEADS, BLOCK_TOKENS, WIDTH)
    pools = [ARENA.empty(torch.Size(shape).numel(), kv).view(shape).uniform_(-1, 1) for _ in range(2)]
    norm = torch.ones(hidden, dtype=torch.bfloat16)
    weights = {name: matrix(format, rows, columns.get(name, hidden), level) for name, rows in heights.items()}
    vectors = {"first_norm": norm, "second_norm": norm}
    return LayerParts(weights, vectors, pools[0], pools[1], None, 1e-6, WIDTH**-0.5)


def layers(
    name: str, parts: list[LayerParts], context: int, rows: int, level: Kernel, weights_count: bool = True
) -> Operator:
    hidden = parts[0].weights["query"].shape[1]
    chain = LayerChain([BlockKernel(part, level) for part in parts])
    each = context // BLOCK_TOKENS + 1
    tables = [[row * each + block for block in range(each)] for row in range(rows)]
    histories = RowHistories(tables, [0] * rows, [context] * rows, 1)
    x, angles = torch.randn(rows, hidden).bfloat16(), torch.ones(rows, WIDTH).bfloat16()
    kept = rows * (context + 1) * 2 * KV_HEADS * WIDTH * parts[0].keys.dtype.itemsize
    weights = sum(weight.nbytes for part in parts for weight in part.weights.values())
    values = sum(weight.numel() for part in parts for weight in part.weights.values())
    attention = len(parts) * 4 * rows * context * HEADS * WIDTH
    return Operator(
        f"{name}, {rows} rows",
        lambda: chain.run(x, angles, angles, [histories] * len(parts)),
        kept * len(parts) + (weights if weights_count else 0),
        attention + (2 * rows * values if weights_count else 0),
    )


def operators(level: Kernel) -> Iterator[Operator]:
    for format in ("nf4", "int8", "bf16"):
        yield from products(format, level)
        parts = [layer_parts(format, HIDDEN, INNER, 8, torch.bfloat16, level) for _ in range(LAYERS)]
        for rows in (1, 4):
            yield layers(f"{format} whole layers, 100 tokens", parts, 100, rows, level)
        del parts
    for kv in (torch.bfloat16, torch.float16, torch.float32):
        name = str(kv).removeprefix("torch.")
        parts = [layer_parts("nf4", 64, 64, 4 * (4096 // BLOCK_TOKENS + 1), kv, level) for _ in range(2 * LAYERS)]
        for rows in (1, 4):  # the matrices are so small that attention is all that counts
            yield layers(f"attention, 4096 tokens in {name}", parts, 4096, rows, level, weights_count=False)
        del parts


def compare(operator: Operator, read: Callable[[], object], read_bytes: int, spend_s: float) -> Line:
    operator.run()
    own: list[float] = []
    plain: list[float] = []
    until = time.perf_counter() + spend_s
    while len(own) < 5 or time.perf_counter() < until:
        own.append(seconds(operator.run))
        plain.append(seconds(read))
    ratio = statistics.median(reading / working for working, reading in zip(own, plain, strict=True))
    median = statistics.median(own)
    return Line(
        operator.name,
        round(operator.nbytes / median / 1e9, 1),
        round(operator.operations / median / 1e9, 1),
        round(read_bytes / statistics.median(plain) / 1e9, 1),
        round(operator.nbytes / read_bytes * ratio, 3),
    )


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--level", choices=list(levels()), default=None)
    parser.add_argument("--seconds", type=float, default=1.0, help="spent on each operator")
    parser.add_argument("--only", default="", help="operators whose name begins so")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    level = levels()[options.level] if options.level else kernel()
    if level is None:
        sys.exit("no kernel runs here: install a C compiler and splitrun again")
    memory = ARENA.empty(READ_BYTES, torch.uint8).fill_(1)
    print(f"{level.name}, {options.threads} threads, bf16 activations")
    print(f"{'operator':40} {'GB/s':>8} {'GFLOP/s':>8} {'read GB/s':>10} {'share':>6}")
    lines = []
    for operator in operators(level):
        if not operator.name.startswith(options.only):
            continue
        line = compare(operator, lambda: level.read(memory), memory.nbytes, options.seconds)
        lines.append(line)
        print(
            f"{line.operator:40} {line.gigabytes_per_s:8.1f} {line.gigaflops:8.1f} "
            f"{line.read_gigabytes_per_s:10.1f} {line.share:6.2f}",
            flush=True,
        )
    print(json.dumps({"level": level.name, "threads": options.threads, "operators": [asdict(line) for line in lines]}))


if __name__ == "__main__":
    main()
