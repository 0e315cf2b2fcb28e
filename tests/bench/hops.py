"""What a hop between processes costs on loopback: CURVE, framing and threads included.

    python tests/bench/hops.py [--quick]

Two processes exchange steps and activations of the 1.5B shape (hidden 1536, bf16): one row, as in decode, and a
prompt chunk of 512. A hop is half a round trip: encode, send, receive, decode, check. One line of JSON at the end.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
import statistics
import time
from multiprocessing.connection import Connection

import numpy
import torch

from splitrun.schedule.request import SamplingParams
from splitrun.schedule.step import RowSampling, Step
from splitrun.transport.frames import Frame
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


def echo(pipe: Connection) -> None:
    """Send every step back, decoded and encoded again."""

    def receive(frame: Frame) -> None:
        mailbox.send("first", step_frame(SESSION, 0, 0, step_of(frame), frame.body))

    mailbox = SocketMailbox(SESSION, receive)
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


def main() -> None:
    """Measure both sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rounds, to see that it works")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=echo, args=(there,), daemon=True)
    process.start()
    arrived: queue.SimpleQueue[Frame] = queue.SimpleQueue()
    mailbox = SocketMailbox(SESSION, arrived.put)
    mailbox.connect("second", Address(*here.recv()))
    here.send((mailbox.address.endpoint, mailbox.address.public_key))
    here.recv()
    figures = {}
    for name, tokens, count in (("decode", 1, 2000), ("prefill_512", 512, 100)):
        seconds = round_trips(mailbox, arrived, tokens, 5 if quick else count)
        hop_s = statistics.median(seconds) / 2
        worst_s = sorted(seconds)[int(len(seconds) * 0.95)] / 2
        gigabits = tokens * HIDDEN * 2 * 8 / hop_s / 1e9
        print(f"{name:12} {hop_s * 1e3:.3f} ms a hop (95 %: {worst_s * 1e3:.3f} ms), {gigabits:.2f} Gbit/s")
        figures[name] = {"hop_ms": round(hop_s * 1e3, 4), "hop_p95_ms": round(worst_s * 1e3, 4)}
    here.send(True)
    process.join()
    mailbox.close()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
