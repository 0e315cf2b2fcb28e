"""Decoding with a whole model on the processor: tokens a second, and the share of what the memory's speed allows.

    python tests/bench/decode.py [--weights nf4] [--contexts 128,4096] [--batches 1,4] [--layers 28] [--threads N]

Runs the stage that the engine runs (embedding, every layer, head, greedy choice) on random weights in the shape of
DeepSeek-R1-Distill-Qwen-1.5B, with a KV cache filled to the context. The share of the bound is the time of a plain
multi-threaded read of as many bytes as a step must touch (weights, scales, and the KV of every row), divided by the
step's time; reads and steps alternate, and the median of the pairs' ratios counts. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy
import torch
from noise import noisy
from transformers import AutoConfig

from splitrun.kernels.cpu.arena import ARENA
from splitrun.kernels.cpu.library import kernel
from splitrun.kernels.formats import QUANTIZED
from splitrun.kernels.weight import Weight, install
from splitrun.model.cut import CutModel, CutRange
from splitrun.model.structure import inspect
from splitrun.schedule.request import SamplingParams
from splitrun.schedule.step import RowSampling, Step
from splitrun.stage.generic import RangeStage
from splitrun.stage.load import StageSize, load_stage

SHAPE = {
    **{"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2},
    **{"vocab_size": 151936, "max_position_embeddings": 131072, "tie_word_embeddings": False},
}
BLOCK_TOKENS = 64
READ_BYTES = 1 << 30


def fill(model: CutModel, weights: str) -> int:
    """Random values of a size that keeps activations finite."""
    generator, level = torch.Generator().manual_seed(0), kernel()
    assert level is not None
    total = 0
    for name in model.own_names:
        shape = model.skeleton.model.get_parameter(name).shape
        value: Weight | torch.Tensor
        if len(shape) == 2 and weights in QUANTIZED:
            value = noisy(weights, *shape, level)
        else:
            value = torch.empty(shape, dtype=model.dtype).uniform_(-1, 1, generator=generator)
            value = value.mul_(1.7 * shape[1] ** -0.5) if len(shape) == 2 else value.abs_().add_(0.5)
        install(model.skeleton.model, name, value)
        total += value.nbytes
    return total


def build(weights: str, kv_dtype: str, layers: int, context: int, rows: int) -> RangeStage:
    """The whole model as one stage, its KV blocks full of noise."""
    config = AutoConfig.for_model("qwen2", num_hidden_layers=layers, **SHAPE)
    structure = inspect(config)
    blocks = rows * (-(-context // BLOCK_TOKENS) + 2)
    dtype = "bf16" if weights in QUANTIZED else weights
    pools = {group.name: blocks for group in structure.groups}
    size = StageSize("cpu", dtype, kv_dtype, pools, BLOCK_TOKENS, rows)
    stage = load_stage(config, structure, CutRange(True, 0, layers, True), size, lambda model: fill(model, weights))
    noise = torch.randn(1 << 16)
    for store in stage._stores.values():
        for scales in store.scales or ():
            scales.fill_(0.02)
        for pool in (store.keys, store.values):
            size = 40 if pool.dtype == torch.int8 else 1
            repeated = (noise * size).to(pool.dtype).repeat(-(-pool.numel() // noise.numel()))
            pool.copy_(repeated[: pool.numel()].view_as(pool))
    return stage


def step(index: int, context: int, rows: int, per_row: int) -> Step:
    """One decoding step of rows with this much context, each in blocks of its own."""
    tables = numpy.arange(rows * per_row, dtype=numpy.int32).reshape(rows, per_row)
    greedy = SamplingParams(temperature=0)
    return Step(
        index=index,
        epoch=0,
        token_ids=(numpy.arange(rows, dtype=numpy.int32) + 100 * index) % 3000,
        query_starts=numpy.arange(rows + 1, dtype=numpy.int32),
        context_lengths=numpy.full(rows, context, dtype=numpy.int32),
        slots=numpy.arange(rows, dtype=numpy.int32),
        block_tables={"full": tables},
        sampling=(RowSampling(greedy, 0, context + 1),) * rows,
    )


def touched_bytes(stage: RangeStage, context: int, rows: int) -> int:
    """Bytes that one step cannot but read: every weight but the embedding table, and each row's keys and values."""
    embedding: int = stage.model.skeleton.model.get_input_embeddings().weight.nbytes
    per_token = sum(store.nbytes // (store.keys.shape[0] * BLOCK_TOKENS) for store in stage._stores.values())
    return stage.weight_bytes - embedding + rows * (context + 1) * per_token


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(stage: RangeStage, context: int, rows: int, memory: torch.Tensor, spend_s: float) -> dict[str, float]:
    """Steps and reads in turn, after one of each."""
    level = kernel()
    assert level is not None
    per_row = -(-context // BLOCK_TOKENS) + 2
    own: list[float] = []
    reading: list[float] = []
    until = time.perf_counter() + spend_s
    while len(own) < 6 or time.perf_counter() < until:
        following = step(len(own), context, rows, per_row)
        own.append(seconds(lambda following=following: stage.run(following, None)))  # type: ignore[misc]
        reading.append(seconds(lambda: level.read(memory)))
    own, reading = own[1:], reading[1:]
    nbytes = touched_bytes(stage, context, rows)
    share = statistics.median(read / took for took, read in zip(own, reading, strict=True)) * nbytes / memory.nbytes
    median = statistics.median(own)
    return {
        "milliseconds": round(median * 1e3, 2),
        "tokens_per_s": round(rows / median, 2),
        "bytes": nbytes,
        "read_GBps": round(memory.nbytes / statistics.median(reading) / 1e9, 2),
        "share_of_bound": round(share, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", choices=[*QUANTIZED, "bf16", "fp16"], default="nf4")
    parser.add_argument("--kv", default="bf16", help="type of keys and values")
    parser.add_argument("--contexts", default="128,4096")
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="spent on each line")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if kernel() is None:
        sys.exit("no kernel runs here: install a C compiler and splitrun again")
    contexts = [int(word) for word in options.contexts.split(",")]
    batches = [int(word) for word in options.batches.split(",")]
    stage = build(options.weights, options.kv, options.layers, max(contexts), max(batches))
    memory = ARENA.empty(READ_BYTES, torch.uint8).fill_(1)
    print(f"{options.weights}, {options.layers} layers, {options.threads} threads, KV in {options.kv}")
    print(f"{'context':>8} {'batch':>6} {'ms':>8} {'tok/s':>8} {'of one':>7} {'GB':>6} {'read GB/s':>10} {'share':>6}")
    lines = []
    for context in contexts:
        alone = None
        for rows in batches:
            found = measure(stage, context, rows, memory, options.seconds)
            alone = alone or found["tokens_per_s"] / rows
            times = found["tokens_per_s"] / alone
            lines.append({"context": context, "batch": rows, "times_batch_1": round(times, 2), **found})
            print(
                f"{context:8} {rows:6} {found['milliseconds']:8.2f} {found['tokens_per_s']:8.2f} {times:7.2f} "
                f"{found['bytes'] / 1e9:6.3f} {found['read_GBps']:10.2f} {found['share_of_bound']:6.2f}",
                flush=True,
            )
    print(json.dumps({"weights": options.weights, "kv": options.kv, "threads": options.threads, "decode": lines}))


if __name__ == "__main__":
    main()
