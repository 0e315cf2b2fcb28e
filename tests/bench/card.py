"""Every operator of the GPU stage: bytes moved, GB/s, and the share of what a plain copy of the same card moves.

    python tests/bench/card.py [--card cuda:0] [--formats bf16,int8,nf4] [--rows 1] [--contexts 128,4096]

Shapes are those of DeepSeek-R1-Distill-Qwen-1.5B (hidden 1536, MLP 8960, 12 heads over 2, vocabulary 151,936). Each
operator runs many times in one captured graph over weights that together do not fit the cache. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from splitrun.kernels.gpu.attention import DecodeAttention
from splitrun.kernels.gpu.matrix import AnyWeight, GpuMatrix, matrix_of
from splitrun.kernels.gpu.products import Products
from splitrun.kernels.gpu.rows import gate, norm
from splitrun.kernels.gpu.shapes import Heads, History
from splitrun.kernels.gpu.unpack import unpacked
from splitrun.kernels.int8 import Int8Weight
from splitrun.kernels.nf4 import Nf4Weight

HIDDEN, WIDE, VOCABULARY, HEADS, KV_HEADS, WIDTH = 1536, 8960, 151936, 12, 2, 128
MATRICES = {
    "queries, keys, values": ((HEADS + 2 * KV_HEADS) * WIDTH, HIDDEN, False),
    "attention output": (HIDDEN, HEADS * WIDTH, False),
    "gates and ups": (2 * WIDE, HIDDEN, True),
    "down": (HIDDEN, WIDE, False),
    "head": (VOCABULARY, HIDDEN, False),
}
COLD_BYTES = 256 << 20
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    operator: str
    microseconds: float
    bytes: int
    share: float

    @property
    def text(self) -> str:
        """As printed."""
        rate = self.bytes / self.microseconds / 1e3
        moved = f"{self.bytes / 1e6:9.2f} MB {rate:8.0f} GB/s {self.share:5.0%}"
        return f"{self.operator:44} {self.microseconds:9.1f} µs {moved}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", default="cuda:0")
    parser.add_argument("--formats", default="bf16,int8,nf4")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--contexts", default="128,4096")
    args = parser.parse_args()
    torch.cuda.set_device(torch.device(args.card))
    torch.manual_seed(0)
    with torch.inference_mode():
        copy = copy_rate()
        print(f"{torch.cuda.get_device_name()}: a copy moves {copy / 1e9:.0f} GB/s, bytes read and written")
        rows = [*products(args.formats.split(","), args.rows, copy), *others(args.rows, copy)]
        for context in args.contexts.split(","):
            rows += [attention(int(context), args.rows, copy)]
    for row in rows:
        print(row.text)
    print(
        json.dumps({"card": torch.cuda.get_device_name(), "copy_bytes_per_s": copy, "rows": [asdict(r) for r in rows]})
    )


def products(formats: list[str], rows: int, copy: float) -> Iterator[Row]:
    """Decoding products, and the writing out of values for prompts."""
    for format in formats:
        for name, (outputs, columns, gated) in MATRICES.items():
            matrices = [matrix(outputs, columns, format, gated) for _ in range(copies(outputs * columns, format))]
            run = Products(matrices[0].device)
            run.reserve([(matrices[0], gated)], DTYPE)
            x = torch.randn(rows, columns, dtype=DTYPE, device="cuda")
            out = torch.empty(rows, outputs // 2 if gated else outputs, dtype=DTYPE, device="cuda")
            seconds = timed([partial(run, x, one, out, gated=gated) for one in matrices])
            moved = matrices[0].nbytes + x.nbytes + out.nbytes
            yield Row(f"{name}, {format}", seconds * 1e6, moved, moved / seconds / copy)
            if format != "bf16" and name == "down":
                memory = torch.empty(outputs * columns, dtype=DTYPE, device="cuda")
                seconds = timed([partial(unpacked, one, one.parts[0], 0, one.rows, memory) for one in matrices])
                moved = matrices[0].nbytes + memory.nbytes
                yield Row(f"written out for a prompt, {format}", seconds * 1e6, moved, moved / seconds / copy)
            del matrices


def others(rows: int, copy: float) -> Iterator[Row]:
    """What is done row by row."""
    x, weight = torch.randn(rows, HIDDEN, dtype=DTYPE, device="cuda"), torch.ones(HIDDEN, dtype=DTYPE, device="cuda")
    out = torch.empty_like(x)
    seconds = timed([lambda: norm(x, weight, 1e-6, out)])
    yield Row("norm", seconds * 1e6, 3 * x.nbytes, 3 * x.nbytes / seconds / copy)
    many = torch.randn(512, 2 * WIDE, dtype=DTYPE, device="cuda")
    gated = torch.empty(512, WIDE, dtype=DTYPE, device="cuda")
    seconds = timed([lambda: gate(many, gated)])
    moved = many.nbytes + gated.nbytes
    yield Row("gate of a prompt of 512", seconds * 1e6, moved, moved / seconds / copy)


def attention(context: int, rows: int, copy: float) -> Row:
    """One layer's attention of decoding rows."""
    blocks = (context + 64) // 64 + 1
    layers = [heads(rows * blocks) for _ in range(max(1, min(64, COLD_BYTES // (rows * blocks * 64 * 1024))))]
    run = DecodeAttention(layers[0], 16, torch.device("cuda"))
    projected = torch.randn(rows, (HEADS + 2 * KV_HEADS) * WIDTH, dtype=DTYPE, device="cuda")
    turns = torch.ones(rows, WIDTH, device="cuda")
    numbers = torch.arange(rows * blocks, dtype=torch.int32, device="cuda")
    lengths = torch.full((rows,), context, dtype=torch.int32, device="cuda")
    history = History(lengths, numbers.view(rows, blocks), lengths, numbers[:rows], numbers)
    out = torch.empty(rows, HEADS * WIDTH, dtype=DTYPE, device="cuda")
    seconds = timed([partial(run, projected, layer, history, turns, turns, out) for layer in layers])
    moved = rows * context * 2 * KV_HEADS * WIDTH * 2 + projected.nbytes + out.nbytes
    return Row(f"attention behind {context} tokens", seconds * 1e6, moved, moved / seconds / copy)


def heads(blocks: int) -> Heads:
    """A layer's blocks with random contents."""
    keys, values = (torch.randn(blocks, KV_HEADS, 64, WIDTH, device="cuda").to(DTYPE) for _ in range(2))
    return Heads(HEADS, KV_HEADS, WIDTH, keys, values, None, None, 1e-6, WIDTH**-0.5, None)


def matrix(outputs: int, columns: int, format: str, gated: bool) -> GpuMatrix:
    """A random matrix in a format; ``gated``: of two weights."""
    parts = [weight(outputs // 2 if gated else outputs, columns, format) for _ in range(2 if gated else 1)]
    found = matrix_of(parts)
    assert found is not None
    return found


def weight(outputs: int, columns: int, format: str) -> AnyWeight:
    """A random weight in a format."""
    if format == "nf4":
        codes = torch.randint(0, 256, (outputs, columns // 2), dtype=torch.uint8, device="cuda")
        return Nf4Weight(codes, torch.rand(outputs, columns // 64, device="cuda"), DTYPE)
    if format == "int8":
        codes = torch.randint(-127, 128, (outputs, columns), dtype=torch.int8, device="cuda")
        return Int8Weight(codes, torch.rand(outputs, device="cuda"), DTYPE)
    return torch.randn(outputs, columns, device="cuda").to(DTYPE)


def copies(values: int, format: str) -> int:
    """So many matrices do not fit the cache together."""
    size = values * {"bf16": 16, "int8": 8, "nf4": 4.5}[format] / 8
    return max(1, min(64, int(COLD_BYTES // size) + 1))


def timed(calls: list[Callable[[], object]]) -> float:
    """Seconds of one call: the median of replays of a graph that holds all of them several times."""
    turns = max(1, 60 // len(calls))
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(turns):
            for call in calls:
                call()
    graph.replay()
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / (turns * len(calls)))
    return sorted(times)[5]


def copy_rate() -> float:
    """Bytes read and written per second by a copy of half a gigabyte."""
    source = torch.randn(1 << 27, device="cuda")
    target: Tensor = torch.empty_like(source)
    return 2 * source.nbytes / timed([lambda: torch.neg(source, out=target)])


if __name__ == "__main__":
    main()
