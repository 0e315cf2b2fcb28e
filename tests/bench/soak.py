"""Kill or stop a stage again and again under load: every answer must be right, and nothing may grow.

    python tests/bench/soak.py [--minutes 10] [--every 20] [--tokens 2000] [--weights fp32|nf4] [--nodes]
    python tests/bench/soak.py --model DIR --weights nf4 --prompt-tokens 1940 --tokens 60 --minutes 0.1 --decoding
    python tests/bench/soak.py --plug --minutes 0.1 --every 10

Four streams of the demo, two greedy and two sampled, over two stages in processes of their own (or on two Ray
nodes of this machine, with --nodes) and one between them here; of another model in two halves. A fault is SIGKILL,
sometimes SIGSTOP, of one of the two stages at a moment that the clock decides. Printed per fault: the longest pause
that a client saw, how much of it was starting and loading, and the tokens of the streams then. With --plug there is one
fault: every process of the second node is killed at once, and it does not come back. One line of JSON at the end, and
with -o FILE a table; status 1 when an answer differs or something has grown.
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
sys.path += [str(Path(__file__).parent.parent / name) for name in (".", "integration", "unit")]
import destinations
from node_clusters import cluster

import splitrun
from splitrun.engine.remote import RemoteStages
from splitrun.model.files import resolve
from splitrun.model.structure import inspect
from splitrun.planner.facts import Workload
from splitrun.planner.placement import ModelRef, Placement, StageSpec

Stages = Callable[[str], list[int]]
STREAMS = 4


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

    def until_after(self, happened: Callable[..., bool], most_s: float = 300.0) -> float:
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


def placement(options: argparse.Namespace, devices: tuple[str, str]) -> Placement:
    """The demo in three stages, the middle one here; another model in two halves."""
    first, last = devices
    small = options.model == "demo"
    layers = 8 if small else inspect(resolve(options.model, None, weights=False).config).layers
    bounds = [(first, True, (0, 3), False), ("cpu", False, (3, 5), False), (last, False, (5, 8), True)]
    if not small:
        bounds = [(first, True, (0, layers // 2), False), (last, False, (layers // 2, layers), True)]
    stages = tuple(StageSpec(*bound, weights=options.weights) for bound in bounds)
    context = options.prompt_tokens + options.tokens + 1
    block, chunk = (16, 64) if small else (64, 512)
    workload = Workload(context, sessions=STREAMS, block_tokens=block, chunk_tokens=chunk)
    return Placement(1, ModelRef(options.model, layers=layers), workload, stages)


def sampling(index: int, tokens: int) -> splitrun.SamplingParams:
    """Every other stream is sampled."""
    temperature = 0.0 if index % 2 == 0 else 1.0
    return splitrun.SamplingParams(max_tokens=tokens, temperature=temperature, seed=index, ignore_eos=True)


def answer(engine: splitrun.Engine, index: int, options: argparse.Namespace, note: Callable[[], None]) -> list[int]:
    """One stream to its end."""
    prompt = [(7 + index + 3 * place) % 200 for place in range(options.prompt_tokens)]
    ids = []
    for event in engine.stream(prompt, sampling(index, options.tokens)):
        note()
        if event.token_id is not None:
            ids.append(event.token_id)
    return ids


def all_answers(engine: splitrun.Engine, options: argparse.Namespace, note: Callable[[], None]) -> list[list[int]]:
    """The four streams together."""
    found: dict[int, list[int]] = {}

    def work(index: int) -> None:
        found[index] = answer(engine, index, options, note)

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
        engine = stack.enter_context(splitrun.Engine(placement(options, names)))

        def stages(device: str) -> list[int]:
            if nodes is not None and options.plug:
                return [process.pid for process in nodes.processes(device.partition("/")[0])]
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
    parser.add_argument("--prompt-tokens", type=int, default=40, help="tokens of each stream's prompt")
    parser.add_argument("--model", default="demo", help="another model's directory")
    parser.add_argument("--weights", default="fp32", choices=["fp32", "nf4", "int8"])
    parser.add_argument("--decoding", action="store_true", help="faults wait until all streams are past their prompts")
    parser.add_argument("--nodes", action="store_true", help="on two Ray nodes instead of processes")
    parser.add_argument("--plug", action="store_true", help="on two Ray nodes, the second of which is lost for good")
    parser.add_argument("--expected", type=Path, help="file of the undisturbed answers; made, and no more, without one")
    parser.add_argument("-o", "--output", type=destinations.file, help="file for a table")
    options = parser.parse_args()
    options.nodes |= options.plug
    with tempfile.TemporaryDirectory(prefix="splitrun-soak-") as folder:
        sys.exit(soak(options, Path(folder)))


def soak(options: argparse.Namespace, folder: Path) -> int:
    """The soak itself; returns the exit status."""
    chance = random.Random(7)
    watch = Watch()
    with engine_of(options, folder) as (engine, stages):
        expected = undisturbed(engine, options)
        if expected is None:
            return 0
        ended, rounds, wrong = threading.Event(), 0, 0
        far = [spec.device for spec in engine.placement.stages if "/" in spec.device]
        pauses: list[tuple[float, float]] = []
        uses: list[dict[str, float]] = []
        table: list[list[str | float]] = []

        def disturb() -> None:
            while not ended.wait(options.every) and not (options.plug and pauses):
                while options.decoding and not all_decode(engine, options) and not ended.wait(0.02):
                    continue
                device = engine.placement.stages[-1].device if options.plug else chance.choice(far)
                number = signal.SIGSTOP if len(pauses) % 4 == 3 else signal.SIGKILL
                epoch, _, held = engine.core.status().epoch, watch.take(), held_tokens(engine)
                for process in stages(device):
                    os.kill(process, number)
                pause = watch.until_after(lambda epoch=epoch: resumed(engine, epoch))
                pauses.append((pause, loading_s(engine)))
                uses.append(use())
                table.append([signal.Signals(number).name, device, sum(held), *pauses[-1], *uses[-1].values()])
                print(f"{signal.Signals(number).name} of {device}: pause {pauses[-1][0]:.2f} s, of which loading "
                      f"{pauses[-1][1]:.2f} s; {held} tokens; {uses[-1]}", flush=True)  # fmt: skip

        disturber = threading.Thread(target=disturb)
        disturber.start()
        until = time.monotonic() + options.minutes * 60
        while time.monotonic() < until:
            found = all_answers(engine, options, watch.token)
            rounds += 1
            wrong += found != expected
        ended.set()
        disturber.join()
        restarts = sum(stage.restarts for stage in engine.core.status().stages)
    figures, status = report(options, rounds, wrong, restarts, pauses, uses)
    if options.output:
        command = " ".join(["python", "tests/bench/soak.py", *sys.argv[1:]])
        options.output.write_text(f"# Stages killed again and again\n\n`{command}`\n\n{as_table(table)}\n\n{figures}\n")
    return status


def undisturbed(engine: splitrun.Engine, options: argparse.Namespace) -> list[list[int]] | None:
    """What the streams answer when nothing happens; None when that was only to be written down."""
    if options.expected is not None and options.expected.exists():
        return list(json.loads(options.expected.read_text()))
    found = all_answers(engine, options, lambda: None)
    if options.expected is None:
        return found
    options.expected.write_text(json.dumps(found))
    return None


def as_table(rows: list[list[str | float]]) -> str:
    """The faults, one a line."""
    titles = ["fault", "stage", "tokens held", "pause s", "loading s", "MB", "files", "threads", "children"]
    lines = [titles, ["---"] * len(titles)]
    lines += [[f"{value:.2f}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def resumed(engine: splitrun.Engine, epoch: int) -> bool:
    """Whether steps run again after that epoch."""
    return engine.core._scheduler.epoch > epoch and not engine.core._paused


def all_decode(engine: splitrun.Engine, options: argparse.Namespace) -> bool:
    """Whether every stream is past its prompt."""
    held = held_tokens(engine)
    return len(held) == STREAMS and min(held) > options.prompt_tokens


def held_tokens(engine: splitrun.Engine) -> list[int]:
    """Tokens of each running stream whose KV the stages have."""
    with engine.core._lock:
        return [held.tokens for held in engine.core._scheduler.held()]


def loading_s(engine: splitrun.Engine) -> float:
    """Seconds from the start of the newest stage process until it had loaded and was connected."""
    remote = engine.core._pipeline._elsewhere
    return remote.loading_s if isinstance(remote, RemoteStages) else 0.0


def report(
    options: argparse.Namespace, rounds: int, wrong: int, restarts: int, pauses: list[tuple[float, float]],
    uses: list[dict[str, float]],
) -> tuple[str, int]:  # fmt: skip
    """The outcome, printed too, and the exit status: 0 when all is well."""
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
        "model": Path(options.model).name, "weights": options.weights, "nodes": options.nodes,
        "prompt_tokens": options.prompt_tokens, "tokens": options.tokens, "rounds": rounds, "wrong": wrong,
        "faults": len(pauses), "restarts": restarts, "longest_pause_s": round(longest, 2),
        "longest_beyond_loading_s": round(max(beyond), 2), "first": uses[:1], "last": uses[-1:], "grown": grown,
    }  # fmt: skip
    print(json.dumps(figures))
    return json.dumps(figures), int(wrong > 0 or bool(grown) or not rounds)


if __name__ == "__main__":
    main()
