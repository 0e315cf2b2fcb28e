"""Kill or stop a stage again and again under load: every answer must be right, and nothing may grow.

    python tests/bench/soak.py [--minutes 10] [--every 20] [--tokens 2000] [--weights fp32|nf4] [--nodes]

Four streams of the demo, two greedy and two sampled, over two stages in processes of their own (or on two Ray
nodes of this machine, with --nodes) and one between them here. A fault is SIGKILL, sometimes SIGSTOP, of one of the
two stages at a moment that the clock decides. Printed per fault: the longest pause that a client saw, and how much of
it was starting and loading. One line of JSON at the end; status 1 when an answer differs or something has grown.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
sys.path += [str(Path(__file__).parent.parent / "integration"), str(Path(__file__).parent.parent / "unit")]
from node_clusters import cluster

import splitrun
from splitrun.engine.remote import RemoteStages
from splitrun.planner.facts import Workload
from splitrun.planner.placement import ModelRef, Placement, StageSpec

Stages = Callable[[str], list[int]]
STREAMS = 4
PROMPT_TOKENS = 40


@dataclass
class Watch:
    """When tokens came: the longest pause since the last look."""

    last_s: float = field(default_factory=time.monotonic)
    longest_s: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def token(self) -> None:
        """One came."""
        with self.lock:
            now = time.monotonic()
            self.longest_s, self.last_s = max(self.longest_s, now - self.last_s), now

    def until_after(self, happened: Callable[..., bool], most_s: float = 60.0) -> float:
        """Wait for the first token after something has happened; the longest pause until then."""
        began = time.monotonic()
        while not happened() and time.monotonic() - began < most_s:
            time.sleep(0.02)
        since = time.monotonic()
        while self.last_s < since and time.monotonic() - began < most_s:
            time.sleep(0.02)
        return self.take()

    def take(self) -> float:
        """The longest pause, forgotten now."""
        with self.lock:
            taken, self.longest_s = max(self.longest_s, time.monotonic() - self.last_s), 0.0
            return taken


def placement(weights: str, tokens: int, devices: tuple[str, str]) -> Placement:
    """The demo in three stages, the middle one here."""
    first, last = devices
    bounds = [(first, True, (0, 3), False), ("cpu", False, (3, 5), False), (last, False, (5, 8), True)]
    stages = tuple(StageSpec(*bound, weights=weights) for bound in bounds)
    context = PROMPT_TOKENS + tokens + 1
    workload = Workload(context, sessions=STREAMS, block_tokens=16, chunk_tokens=64)
    return Placement(1, ModelRef("demo", layers=8), workload, stages)


def sampling(index: int, tokens: int) -> splitrun.SamplingParams:
    """Every other stream is sampled."""
    temperature = 0.0 if index % 2 == 0 else 1.0
    return splitrun.SamplingParams(max_tokens=tokens, temperature=temperature, seed=index, ignore_eos=True)


def answer(engine: splitrun.Engine, index: int, tokens: int, note: Callable[[], None]) -> list[int]:
    """One stream to its end."""
    prompt = [(7 + index + 3 * place) % 200 for place in range(PROMPT_TOKENS)]
    ids = []
    for event in engine.stream(prompt, sampling(index, tokens)):
        note()
        if event.token_id is not None:
            ids.append(event.token_id)
    return ids


def all_answers(engine: splitrun.Engine, tokens: int, note: Callable[[], None]) -> list[list[int]]:
    """The four streams together."""
    found: dict[int, list[int]] = {}

    def work(index: int) -> None:
        found[index] = answer(engine, index, tokens, note)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(STREAMS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found.get(index, []) for index in range(STREAMS)]


def use() -> dict[str, float]:
    """What must not grow: resident memory in MB, open files, threads, processes below this one."""
    process = psutil.Process()
    return {
        "memory_mb": round(process.memory_info().rss / 1e6, 1),
        "files": process.num_fds(),
        "threads": process.num_threads(),
        "children": len(process.children(recursive=True)),
    }


@contextmanager
def engine_of(options: argparse.Namespace, folder: Path) -> Iterator[tuple[splitrun.Engine, Stages]]:
    """The engine, and a function that names the stage processes of a device."""
    with ExitStack() as stack:
        names = ("process/cpu", "process-2/cpu")
        nodes = None
        if options.nodes:
            nodes = stack.enter_context(cluster(folder / "nodes", "one", "two"))
            names = ("one/cpu", "two/cpu")
        plan = placement(options.weights, options.tokens, names)
        engine = stack.enter_context(splitrun.Engine(plan))

        def stages(device: str) -> list[int]:
            if nodes is not None:
                return [process.pid for process in nodes.stages(device.partition("/")[0])]
            remote = engine.core._pipeline._elsewhere
            assert isinstance(remote, RemoteStages)
            return [remote._processes[device].process_id]  # type: ignore[attr-defined]

        yield engine, stages


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two faults")
    parser.add_argument("--tokens", type=int, default=2000, help="new tokens of each stream")
    parser.add_argument("--weights", default="fp32", choices=["fp32", "nf4", "int8"])
    parser.add_argument("--nodes", action="store_true", help="on two Ray nodes instead of processes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="splitrun-soak-") as folder:
        sys.exit(soak(options, Path(folder)))


def soak(options: argparse.Namespace, folder: Path) -> int:
    """The soak itself; returns the exit status."""
    chance = random.Random(7)
    watch = Watch()
    with engine_of(options, folder) as (engine, stages):
        expected = all_answers(engine, options.tokens, watch.token)
        ended, rounds, wrong = threading.Event(), 0, 0
        pauses: list[tuple[float, float]] = []
        uses: list[dict[str, float]] = []

        def disturb() -> None:
            while not ended.wait(options.every):
                device = chance.choice([spec.device for spec in engine.placement.stages if "/" in spec.device])
                number = signal.SIGSTOP if len(pauses) % 4 == 3 else signal.SIGKILL
                epoch, _ = engine.core.status().epoch, watch.take()
                for process in stages(device):
                    os.kill(process, number)
                pauses.append(
                    (watch.until_after(lambda epoch=epoch: engine.core.status().epoch > epoch), loading_s(engine))
                )
                uses.append(use())
                print(f"{signal.Signals(number).name} of {device}: pause {pauses[-1][0]:.2f} s, of which loading "
                      f"{pauses[-1][1]:.2f} s; {uses[-1]}", flush=True)  # fmt: skip

        disturber = threading.Thread(target=disturb)
        disturber.start()
        until = time.monotonic() + options.minutes * 60
        while time.monotonic() < until:
            found = all_answers(engine, options.tokens, watch.token)
            rounds += 1
            wrong += found != expected
        ended.set()
        disturber.join()
        restarts = sum(stage.restarts for stage in engine.core.status().stages)
    return report(options, rounds, wrong, restarts, pauses, uses)


def loading_s(engine: splitrun.Engine) -> float:
    """Seconds from the start of the newest stage process until it had loaded and was connected."""
    remote = engine.core._pipeline._elsewhere
    assert isinstance(remote, RemoteStages)
    return remote.loading_s


def report(
    options: argparse.Namespace, rounds: int, wrong: int, restarts: int, pauses: list[tuple[float, float]],
    uses: list[dict[str, float]],
) -> int:  # fmt: skip
    """Print the outcome; 0 when all is well."""
    beyond = [pause - loading for pause, loading in pauses] or [0.0]
    half = len(uses) // 2
    grown = {}
    if half >= 2:
        for name in uses[0]:
            before = statistics.median(one[name] for one in uses[1 : half + 1])
            after = statistics.median(one[name] for one in uses[half:])
            slack = 0.05 * before if name == "memory_mb" else 2
            if after > before + slack:
                grown[name] = (before, after)
    longest = max((pause for pause, _ in pauses), default=0.0)
    figures = {
        "weights": options.weights, "nodes": options.nodes, "tokens": options.tokens, "rounds": rounds, "wrong": wrong,
        "faults": len(pauses), "restarts": restarts, "longest_pause_s": round(longest, 2),
        "longest_beyond_loading_s": round(max(beyond), 2), "first": uses[:1], "last": uses[-1:], "grown": grown,
    }  # fmt: skip
    print(json.dumps(figures))
    return int(wrong > 0 or bool(grown) or not rounds)


if __name__ == "__main__":
    main()
