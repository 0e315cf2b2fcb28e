"""A card and the processor: every cut, what the seams cost, prompts copied to the card, several streams at once.

    python tests/bench/split.py [--cuts 0,7,14,21,28] [--weights nf4] [--budget 8GiB] [--streams 1,4] [-o FILE]
    python tests/bench/split.py --second cuda:1 --cuts 14      two cards against one, token for token

Random weights in the shape of DeepSeek-R1-Distill-Qwen-1.5B, or of --model; embedding and head lie on the processor
(on the cards with --second). "isolated" is the sum of the stages' own times for one token, each run alone on its
worker, all of them in turn, so that each finds caches as the others leave them; "again" is that with each stage run
again and again. "seams" is what a token takes beyond the isolated stages: hops, scheduling and handing out. "hop" is
what one takes by itself: a row of activations passed along the same workers, hops and graphs with nothing in them
computed. "beyond" is what is left of a token beside isolated stages and hops, as a share of those. Ends with one JSON
line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from copy import copy
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import destinations
import torch
from shapes import DEFAULT, MODEL_HELP, SHAPES, model_of
from torch import Tensor

from splitrun import Engine, Placement, SamplingParams
from splitrun.engine.link import Link
from splitrun.engine.loading import Load
from splitrun.engine.outcome import Outcome
from splitrun.engine.pipeline import Pipeline
from splitrun.measure.unit_steps import Point, make_step
from splitrun.model.structure import inspect
from splitrun.schedule.step import RowTokens, Step, Tokens
from splitrun.stage.card import CardStage
from splitrun.stage.card_graph import Captures, DecodeGraphs
from splitrun.stage.card_model import card_model
from splitrun.stage.generic import RangeStage
from splitrun.transport.local import DeviceToHost

FILE = """version: 1
model: {{source: {model}, layers: {layers}}}
workload: {{context: {context}, sessions: {sessions}}}
stages:
{stages}
devices: {{{devices}}}
"""
ROUNDS = 30
TURNS = 3
PASSES = 300
COLUMNS = (
    "cut",
    "streams",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "token_ms",
    "again_ms",
    "isolated_ms",
    "seams_us",
    "hop_us",
    "beyond_percent",
    "peak_mib",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT, help=MODEL_HELP)
    parser.add_argument("--card", default="cuda:0")
    parser.add_argument("--second", help="a second card: takes the layers behind the cut, and head and embedding too")
    parser.add_argument("--cuts", default="0,7,14,21,28")
    parser.add_argument("--weights", default="nf4")
    parser.add_argument("--budget", default="8GiB")
    parser.add_argument("--slabs", default="56MiB", help="memory for weights that are copied for prompts; 0MB: none")
    parser.add_argument("--streams", default="1,4")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("-o", "--output", type=destinations.file)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, load = model_of(args.model, folder)
        rows, texts = [], []
        for cut in map(int, args.cuts.split(",")):
            for stages in [_cards(args, cut), _one(args)] if args.second else [_split(args, cut)]:
                found, ids = measure(args, model, load, stages, cut)
                rows += found
                texts.append(ids)
    table = to_table(rows)
    print(table)
    if args.second:
        same = all(first == second for first, second in zip(texts[::2], texts[1::2], strict=True))
        print(f"two cards and one: {'the same' if same else 'OTHER'} tokens")
    if args.output:
        args.output.write_text(table + "\n")
    print(json.dumps(rows))


def _split(args: argparse.Namespace, cut: int) -> list[str]:
    layers, weights = _layers(args), f"weights: {args.weights}"
    if cut == 0:
        return [f"device: cpu, units: [embed, head], layers: [0, {layers}], {weights}"]
    slabs = f", stream_buffer: {args.slabs}" if cut < layers else ""
    rest = f"layers: [{cut}, {layers}], " if cut < layers else ""
    return [
        f"device: cpu, units: [embed], {weights}",
        f'device: "{args.card}", layers: [0, {cut}], {weights}{slabs}',
        f"device: cpu, units: [head], {rest}{weights}",
    ]


def _cards(args: argparse.Namespace, cut: int) -> list[str]:
    weights = f"weights: {args.weights}"
    return [
        f'device: "{args.card}", units: [embed], layers: [0, {cut}], {weights}',
        f'device: "{args.second}", units: [head], layers: [{cut}, {_layers(args)}], {weights}',
    ]


def _one(args: argparse.Namespace) -> list[str]:
    return [f'device: "{args.card}", units: [embed, head], layers: [0, {_layers(args)}], weights: {args.weights}']


def _layers(args: argparse.Namespace) -> int:
    config = SHAPES.get(args.model) or json.loads(Path(args.model, "config.json").read_text())
    return int(config["num_hidden_layers"])


def measure(
    args: argparse.Namespace, model: str, load: Load, stages: list[str], cut: int
) -> tuple[list[dict[str, Any]], list[tuple[int, ...]]]:
    """One placement: a row for each number of streams, and the token ids of the first."""
    streams = list(map(int, args.streams.split(",")))
    cards = [card for card in (args.card, args.second) if card and any(card in stage for stage in stages)]
    devices = ", ".join(
        [f'"{card}": {{memory: {args.budget}}}' for card in cards] + ["cpu: {memory: 32GiB}"] * (not args.second)
    )
    lines = "\n".join(f"  - {{{stage}}}" for stage in stages)
    context = args.prompt_tokens + args.new_tokens + 1
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "placement.yaml")
        sizes = {"model": model, "layers": _layers(args), "context": context, "sessions": max(streams)}
        file.write_text(FILE.format(stages=lines, devices=devices, **sizes))
        torch.cuda.reset_peak_memory_stats()
        rows: list[dict[str, Any]] = []
        ids: list[tuple[int, ...]] = []
        with Engine(Placement.load(file), load=load) as engine:
            for count in streams:
                behind = args.prompt_tokens + args.new_tokens // 2
                # Memory is shared with strangers, and fast or slow for seconds: all take turns, and the least counts.
                turns = []
                warm_up(engine, args, count)
                for _ in range(TURNS):
                    first_s, step_s, found = run(engine, args, count)
                    ids = ids or found
                    alone = [sum(isolated(engine, behind, again)) if count == 1 else 0.0 for again in (True, False)]
                    turns.append((first_s, step_s, *alone))
                first_s, step_s, again_s, isolated_s = map(min, zip(*turns, strict=True))
                row: dict[str, Any] = dict.fromkeys(COLUMNS) | {
                    "cut": cut,
                    "stages": len(stages),
                    "streams": count,
                    "prefill_tokens_per_s": round(count * args.prompt_tokens / first_s),
                    "decode_tokens_per_s": round(count / step_s, 1),
                    "token_ms": round(step_s * 1e3, 3),
                    "peak_mib": torch.cuda.max_memory_reserved() >> 20,
                }
                if count == 1:
                    hops_s = passing(engine, behind)
                    row["again_ms"], row["isolated_ms"] = round(again_s * 1e3, 3), round(isolated_s * 1e3, 3)
                    row["seams_us"] = round((step_s - isolated_s) * 1e6)
                    row["hop_us"] = round(hops_s / max(1, len(stages) - 1) * 1e6)
                    row["beyond_percent"] = round((step_s / (isolated_s + hops_s) - 1) * 100, 1)
                rows.append(row)
                print(to_table([row]).splitlines()[-1], file=sys.stderr, flush=True)
    return rows, ids


def warm_up(engine: Engine, args: argparse.Namespace, count: int) -> None:
    """Capture what graphs there will be."""
    engine.generate(_prompts(args, count), _greedy(2))


def run(engine: Engine, args: argparse.Namespace, count: int) -> tuple[float, float, list[tuple[int, ...]]]:
    """Seconds to the first tokens and of one decoding step, and the ids."""
    times = []
    for tokens in (1, 1 + args.new_tokens):
        start = time.perf_counter()
        found = engine.generate(_prompts(args, count), _greedy(tokens))
        times.append(time.perf_counter() - start)
    return times[0], (times[1] - times[0]) / args.new_tokens, [tuple(completion.token_ids) for completion in found]


def _prompts(args: argparse.Namespace, count: int) -> list[list[int]]:
    return [[(7 * place + 13 * row) % 1000 + 5 for place in range(args.prompt_tokens)] for row in range(count)]


def _greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


def isolated(engine: Engine, behind: int, again: bool = False) -> list[float]:
    """Median seconds of each stage for one token ``behind`` others, alone on its worker with an activation that lies
    there already. All take turns, as for a token; ``again``: each runs all its rounds at once."""
    structure = inspect(engine.files.config)
    step = _step(engine, behind)
    calls = []
    for link in engine.core.pipeline.links:
        assert isinstance(link, Link)
        assert isinstance(link.stage, RangeStage)
        model, device = link.stage.model, link.stage.model.device
        shape = (1, structure.hidden)
        incoming = None if model.cut.embed else torch.full(shape, 0.1, dtype=model.dtype, device=device)

        def timed(stage: Any = link.stage, incoming: Any = incoming, device: Any = device) -> float:
            start = time.perf_counter()
            stage.run(step, incoming)
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
            return time.perf_counter() - start

        calls.append(partial(link.worker.call, timed))
    order = [call for call in calls for _ in range(ROUNDS)] if again else calls * ROUNDS
    times: dict[int, list[float]] = {id(call): [] for call in calls}
    for call in order:
        times[id(call)].append(call())
    return [statistics.median(times[id(call)]) for call in calls]


class Passing:
    """A stage that computes nothing: it has an activation, or takes up that of the stage before."""

    def __init__(self, stage: RangeStage, last: bool) -> None:
        model = stage.model
        hidden = model.structure.hidden
        self._activation = torch.zeros((1, hidden), dtype=model.dtype, device=model.device)
        self._last = last
        between = isinstance(stage, CardStage) and not model.cut.embed and not model.cut.head
        empty = card_model(model, {}) if between else None
        groups = tuple(group.name for group in stage.rules.groups)
        self._graphs = empty and DecodeGraphs(empty, groups, model.dtype, model.device, Captures(model.device))

    def any_thread(self, step: Step) -> bool:
        """Always."""
        return True

    def left(self) -> torch.cuda.Event | None:
        """Behind what it has left in pinned memory."""
        assert self._graphs
        return self._graphs.done

    def run(self, step: Step, incoming: Tensor | None) -> Tensor | Tokens:
        """As a stage does."""
        if self._last:
            return Tokens(step.index, step.epoch, (RowTokens((1,)),))
        if self._graphs:
            self._graphs.run(step, range(step.rows), incoming)
            return self._graphs.left(step.rows)
        if incoming is not None:
            self._activation.copy_(incoming, non_blocking=True)
        return self._activation

    def close(self) -> None:
        """Nothing is held open."""


def passing(engine: Engine, behind: int) -> float:
    """Seconds of all hops of a token: of one that goes through the engine's own workers and hops, but not its stages.
    As in earnest, the worker that has the last stage sends the next one off."""
    step = _step(engine, behind)
    links = [link for link in engine.core.pipeline.links if isinstance(link, Link)]
    empty = []
    for link in links:
        assert isinstance(link.stage, RangeStage)
        stage, onward = Passing(link.stage, link.onward is None), copy(link.onward)
        if isinstance(onward, DeviceToHost):
            onward.left = stage.left
        empty.append(Link(stage, link.worker, link.name, onward))
    moments: list[float] = []
    done = threading.Event()

    def arrived(outcome: Outcome) -> None:
        moments.append(time.perf_counter())
        if len(moments) < PASSES:
            pipeline.submit(step)
        else:
            done.set()

    if len(links) == 1:
        return 0.0
    pipeline = Pipeline(empty, arrived)
    pipeline.submit(step)
    assert done.wait(60), "the hops pass nothing on"
    return statistics.median(later - earlier for earlier, later in pairwise(moments))


def _step(engine: Engine, behind: int) -> Step:
    """One new token behind others."""
    structure, tokens = inspect(engine.files.config), engine.placement.workload.block_tokens
    blocks = min((use.total for use in engine.core.status().blocks.values()), default=1)
    return make_step(Point(1, 1, behind), structure.groups, tokens, blocks)


def to_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of the rows."""
    lines = ["| " + " | ".join(name.replace("_", " ") for name in COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join("" if row[name] is None else str(row[name]) for name in COLUMNS) + " |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
