"""What a hop between processes costs on loopback: CURVE, framing and threads included.

    python tests/bench/hops.py [--quick] [--shaped] [-o FILE]

With --shaped (root only) also over a line of 1 Gbit/s to another network namespace: what share of the line a prompt
chunk uses, chunks sent one behind the other, as prompts are.

Two processes exchange steps and activations of the 1.5B shape (hidden 1536, bf16): one row, as in decode, and a
prompt chunk of 512. A hop is half a round trip: encode, send, receive, decode, check. One line of JSON at the end.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy
import torch

sys.path.append(str(Path(__file__).parent.parent))
import destinations
from networks import enter, shaped

from splitrun.schedule.request import SamplingParams
from splitrun.schedule.step import RowSampling, Step
from splitrun.transport.frames import Frame, Kind
from splitrun.transport.mailbox import Address
from splitrun.transport.messages import step_frame, step_of
from splitrun.transport.socket import SocketMailbox

SESSION, HIDDEN = 1, 1536


def make_step(index: int, tokens: int) -> Step:
    """One row with a history of 1000 tokens in blocks of 64."""
    return Step(
        index=index,
        epoch=0,
        token_ids=numpy.zeros(tokens, numpy.int32),
        query_starts=numpy.array([0, tokens], numpy.int32),
        context_lengths=numpy.array([1000], numpy.int32),
        slots=numpy.zeros(1, numpy.int32),
        block_tables={"full": numpy.arange(24, dtype=numpy.int32).reshape(1, 24)},
        sampling=(RowSampling(SamplingParams(), 1, 1001),),
        prompt_logprobs=(None,),
        replay=(False,),
    )


def echo(pipe: Connection, namespace: str | None, host: str) -> None:
    """Send every step of epoch 0 back, decoded and encoded again; of others only word that they came."""
    if namespace is not None:
        enter(namespace)

    def receive(frame: Frame) -> None:
        step = step_of(frame)
        if frame.epoch == 0:
            mailbox.send("first", step_frame(SESSION, 0, 0, step, frame.body))
        else:
            mailbox.send("first", Frame(Kind.TOKENS, SESSION, step=frame.step))

    mailbox = SocketMailbox(SESSION, receive, host)
    pipe.send((mailbox.address.endpoint, mailbox.address.public_key))
    mailbox.connect("first", Address(*pipe.recv()))
    pipe.send(True)
    pipe.recv()
    mailbox.close()


def round_trips(mailbox: SocketMailbox, arrived: queue.SimpleQueue[Frame], tokens: int, count: int) -> list[float]:
    """Seconds of each round trip."""
    activation = torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16)
    seconds = []
    for index in range(count):
        started = time.perf_counter()
        mailbox.send("second", step_frame(SESSION, 0, 0, make_step(index, tokens), activation))
        step_of(arrived.get(timeout=60))
        seconds.append(time.perf_counter() - started)
    return seconds


def stream_s(mailbox: SocketMailbox, arrived: queue.SimpleQueue[Frame], tokens: int, count: int) -> float:
    """Seconds of sending that many chunks one behind the other, until the last one is known to have arrived."""
    activation = torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16)
    step = make_step(0, tokens)
    started = time.perf_counter()
    for index in range(count):
        mailbox.send("second", replace(step_frame(SESSION, 0, 0, step, activation), epoch=1, step=index))
    for _ in range(count):
        arrived.get(timeout=60)
    return time.perf_counter() - started


@contextmanager
def connected(namespace: str | None, here: str, there: str) -> Iterator[tuple[SocketMailbox, queue.SimpleQueue[Frame]]]:
    """A mailbox of this process whose peer "second" is another process."""
    spawn = multiprocessing.get_context("spawn")
    near, far = spawn.Pipe()
    process = spawn.Process(target=echo, args=(far, namespace, there), daemon=True)
    process.start()
    arrived: queue.SimpleQueue[Frame] = queue.SimpleQueue()
    mailbox = SocketMailbox(SESSION, arrived.put, here)
    mailbox.connect("second", Address(*near.recv()))
    near.send((mailbox.address.endpoint, mailbox.address.public_key))
    near.recv()
    yield mailbox, arrived
    near.send(True)
    process.join()
    mailbox.close()


def loopback(quick: bool) -> dict[str, dict[str, float]]:
    """Both sizes on the loopback."""
    figures = {}
    with connected(None, "127.0.0.1", "127.0.0.1") as (mailbox, arrived):
        for name, tokens, count in (("decode", 1, 2000), ("prefill_512", 512, 100)):
            seconds = round_trips(mailbox, arrived, tokens, 5 if quick else count)
            hop_s = statistics.median(seconds) / 2
            worst_s = sorted(seconds)[int(len(seconds) * 0.95)] / 2
            gigabits = tokens * HIDDEN * 2 * 8 / hop_s / 1e9
            print(f"{name:12} {hop_s * 1e3:.3f} ms a hop (95 %: {worst_s * 1e3:.3f} ms), {gigabits:.2f} Gbit/s")
            figures[name] = {"hop_ms": round(hop_s * 1e3, 4), "hop_p95_ms": round(worst_s * 1e3, 4)}
    return figures


def one_gigabit(quick: bool) -> dict[str, float]:
    """Prompt chunks over a line of 1 Gbit/s."""
    with shaped() as line, connected(line.namespace, line.here, line.there) as (mailbox, arrived):
        round_trips(mailbox, arrived, 512, 3)
        count = 5 if quick else 100
        one_s = statistics.median(round_trips(mailbox, arrived, 512, 3 if quick else 30)) / 2
        all_s = stream_s(mailbox, arrived, 512, count)
    bits = 512 * HIDDEN * 2 * 8
    alone, behind = bits / one_s / 1e9, bits * count / all_s / 1e9
    print(f"1 Gbit/s     one chunk of 512 alone {alone:.0%} of the line, {count} one behind the other {behind:.0%}")
    return {"alone": round(alone, 4), "stream": round(behind, 4)}


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rounds, to see that it works")
    parser.add_argument("--shaped", action="store_true", help="also over a line of 1 Gbit/s; needs root")
    parser.add_argument("-o", "--output", type=destinations.file, help="file for a table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    here = loopback(options.quick)
    line = one_gigabit(options.quick) if options.shaped else {}
    print(json.dumps({**here, **({"share_of_1_gbit": line} if line else {})}))
    if options.output:
        command = " ".join(["python", "tests/bench/hops.py", *sys.argv[1:]])
        options.output.write_text(f"# One hop\n\n`{command}`\n\n{table(here, line)}\n")


def table(here: dict[str, dict[str, float]], line: dict[str, float]) -> str:
    """The figures for people."""
    lines = ["| activation of the 1.5B shape, bf16 | median ms a hop | 95 % below | share of 1 Gbit/s |"]
    lines.append("|---|---|---|---|")
    shares = {"prefill_512": f"{line['alone']:.0%} alone, {line['stream']:.0%} in a row"} if line else {}
    for name, figures in here.items():
        lines.append(f"| {name} | {figures['hop_ms']} | {figures['hop_p95_ms']} | {shares.get(name, '')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
