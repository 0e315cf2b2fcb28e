"""Every operator of the processor kernels: gigabytes and operations a second, and the share of the machine's bound.

    python tests/bench/operators.py [--threads N] [--level avx2] [--seconds S] [--only nf4] [-o tests/bench/results]

Weights and KV are larger than the caches. Each operator runs in turn with what bounds it, and the share is the median
of the pairs' ratios, so that a busy neighbour, who slows both, moves it little. Few rows are bound by memory: a plain
read of it. Prompts are bound by arithmetic: the same instruction on registers alone; so are products of more than a
few rows, whose GFLOP/s say more than their share of a read. Ends with one line of JSON; -o writes that and a table.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import destinations
import torch
from noise import noisy
from torch import Tensor

from splitrun.kernels.cpu.arena import ARENA
from splitrun.kernels.cpu.block import BlockKernel, LayerChain, LayerParts, RowHistories
from splitrun.kernels.cpu.dense import DenseWeight
from splitrun.kernels.cpu.library import Kernel, kernel, levels
from splitrun.kernels.cpu.many import ManyRows, of_level
from splitrun.kernels.cpu.tiled import TiledWeight

HIDDEN, INNER, WIDTH, HEADS, KV_HEADS = 1536, 8960, 128, 12, 2
MATRICES, LAYERS = 16, 6
BLOCK_TOKENS = 64
ROWS = (1, 2, 4, 8, 16)
PROMPT_ROWS = 512
READ_BYTES = 1 << 28
SPINS = 1_000_000
TITLE = f"{'operator':44} {'GB/s':>7} {'GFLOP/s':>8}  {'bound':>12} {'share':>6}"


@dataclass(frozen=True)
class Line:
    """One operator. ``bound`` is what it is held against, in ``unit``, GB/s or GFLOP/s; ``share`` its share of that."""

    operator: str
    gigabytes_per_s: float
    gigaflops: float
    bound: float
    unit: str
    share: float

    def __str__(self) -> str:
        bound = f"{self.bound:.0f} {self.unit}"
        return f"{self.operator:44} {self.gigabytes_per_s:7.1f} {self.gigaflops:8.1f}  {bound:>12} {self.share:6.2f}"


@dataclass(frozen=True)
class Operator:
    """Something to time: what it must read at least, and how many operations it does."""

    name: str
    run: Callable[[], object]
    nbytes: int
    operations: int
    spin: ManyRows | None = None
    """Whose instruction bounds it; None: memory does."""


def matrix(format: str, rows: int, columns: int, level: Kernel) -> TiledWeight | DenseWeight:
    if format == "bf16":
        values = ARENA.empty(rows * columns, torch.bfloat16).view(rows, columns)
        return DenseWeight(values.uniform_(-1, 1).mul_(columns**-0.5), level)
    return noisy(format, rows, columns, level)


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
        if format != "bf16":
            yield from prompts(format, level)
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


def prompts(format: str, level: Kernel) -> Iterator[Operator]:
    """Products of a prompt's rows with the codes, by every kernel of the level and of those below."""
    weight = matrix(format, INNER, HIDDEN, level)
    x = torch.randn(PROMPT_ROWS, HIDDEN).bfloat16()
    out = torch.empty(PROMPT_ROWS, INNER, dtype=torch.bfloat16)
    for name, many in of_level(level.name).items():

        def multiply(many: ManyRows = many) -> None:
            many.product(weight.matrix, x, out)

        operations = 2 * PROMPT_ROWS * INNER * HIDDEN
        nbytes = weight.nbytes + x.nbytes + out.nbytes
        yield Operator(f"{format} product, {PROMPT_ROWS} rows, {name}", multiply, nbytes, operations, many)


def compare(operator: Operator, memory: Tensor, level: Kernel, spend_s: float) -> Line:
    """Run it in turn with its bound."""
    operator.run()
    own: list[float] = []
    bounds: list[float] = []
    done = operator.nbytes if operator.spin is None else operator.operations
    until = time.perf_counter() + spend_s
    while len(own) < 5 or time.perf_counter() < until:
        own.append(seconds(operator.run))
        start = time.perf_counter()
        if operator.spin is None:
            level.read(memory)
            possible = memory.nbytes
        else:
            possible = operator.spin.spin(SPINS)
        bounds.append(possible / (time.perf_counter() - start))
    share = statistics.median(done / took / bound for took, bound in zip(own, bounds, strict=True))
    median = statistics.median(own)
    return Line(
        operator.name,
        round(operator.nbytes / median / 1e9, 1),
        round(operator.operations / median / 1e9, 1),
        round(statistics.median(bounds) / 1e9, 1),
        "GB/s" if operator.spin is None else "GFLOP/s",
        round(share, 3),
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
    parser.add_argument("-o", dest="output", type=destinations.folder, help="folder for the table, in text and in JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    level = levels()[options.level] if options.level else kernel()
    if level is None:
        sys.exit("no kernel runs here: install a C compiler and splitrun again")
    memory = ARENA.empty(READ_BYTES, torch.uint8).fill_(1)
    about = f"{level.name}, {options.threads} threads, bf16 activations, {platform.processor() or platform.machine()}"
    print(about)
    print(TITLE)
    lines = []
    for operator in operators(level):
        if operator.name.startswith(options.only):
            lines.append(compare(operator, memory, level, options.seconds))
            print(lines[-1], flush=True)
    found = {"level": level.name, "threads": options.threads, "operators": [asdict(line) for line in lines]}
    print(json.dumps(found))
    if options.output:
        table = "\n".join(map(str, lines))
        command = " ".join(["python", "tests/bench/operators.py", *sys.argv[1:]])
        text = f"# Operators of the processor kernels\n\n`{command}`: {about}\n\n```\n{TITLE}\n{table}\n```\n"
        (options.output / "operators.md").write_text(text)
        (options.output / "operators.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
