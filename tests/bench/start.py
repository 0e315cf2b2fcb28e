"""Seconds to the first token of a start, and what its memory is made of: ``splitrun run`` in a process of its own.

    python tests/bench/start.py MODEL [--weights nf4,int8] [--repeat 3] [--json] [--empty]

The first start (``--empty`` deletes the packed weights before) quantizes; later ones read what it kept. Where this
machine has no figures of the model yet, that one also measures them, for up to a minute: start twice. Peak memory is
the kernel's high-water mark of resident pages, anonymous and file pages alike, of the one process that ``run`` is. Its
parts are what the mark grew by at each step of the same start, taken apart in another process. A start may keep what
Python compiled, as it does wherever splitrun is installed, even where ``PYTHONDONTWRITEBYTECODE`` is set.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

ALLOWED_BYTES = 450 << 20
"""For everything but weights and KV: Python, torch, transformers, tokenizer, workspace."""

PARTS = """
import json, sys

def mark(name):
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    marks.append((name, int(fields["VmRSS"].split()[0]) * 1024))

marks = []
mark("interpreter")
import torch
mark("torch")
from splitrun.model.lean_import import import_transformers
import_transformers()
mark("transformers")
import splitrun
placement = splitrun.plan(sys.argv[1], weights=sys.argv[2])
import splitrun.engine.engine
mark("planning")
with splitrun.Engine(placement, text=False) as engine:
    mark("weights, KV and stage")
    engine.tokenizer.encode("Hello")
    mark("tokenizer")
    engine.generate([list(range(3, 35))], splitrun.SamplingParams(max_tokens=1, temperature=0))
    mark("first answer")
    # every stage is in this process: its links hold them
    stages = [link.stage for link in engine.core.pipeline.links]
    weights, kv = sum(stage.weight_bytes for stage in stages), sum(stage.kv_bytes for stage in stages)
print(json.dumps({"marks": marks, "weights": weights, "kv": kv}))
"""


def start(model: str, weights: str) -> tuple[float, int]:
    """Seconds until ``splitrun run`` prints its first token, and the peak of its resident bytes."""
    command = [sys.executable, "-m", "splitrun", "run", model, "Hello", "--max-tokens", "1", "--weights", weights]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    process.stdout.read(1)
    seconds = time.perf_counter() - begun
    process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}")
    return seconds, usage.ru_maxrss * 1024


def parts(model: str, weights: str) -> dict[str, Any]:
    """What the memory of such a start is made of."""
    run = subprocess.run([sys.executable, "-c", PARTS, model, weights], stdout=subprocess.PIPE, check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    marks = found["marks"]
    grown = {name: now - before for (_, before), (name, now) in zip([("", 0), *marks], marks, strict=False)}
    grown["stage beside weights and KV"] = grown.pop("weights, KV and stage") - found["weights"] - found["kv"]
    return {"weights": found["weights"], "KV": found["kv"], **grown}


def measure(model: str, weights: str, repeat: int, empty: bool) -> dict[str, Any]:
    """One format: seconds of each start, the peak of the last, and its parts."""
    if empty:
        subprocess.run([sys.executable, "-m", "splitrun", "cache", "clear", model], check=True, stdout=sys.stderr)
    starts = [start(model, weights) for _ in range(repeat)]
    made_of = parts(model, weights)
    beside = starts[-1][1] - made_of["weights"] - made_of["KV"]
    return {
        "weights": weights,
        "seconds": [round(seconds, 2) for seconds, _ in starts],
        "first_peak_bytes": starts[0][1],
        "peak_bytes": starts[-1][1],
        "beside_weights_and_kv_bytes": beside,
        "within_450_mb": beside <= ALLOWED_BYTES,
        "parts_bytes": made_of,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model")
    parser.add_argument("--weights", default="nf4,int8")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--empty", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for weights in options.weights.split(","):
        found = measure(options.model, weights, options.repeat, options.empty)
        if options.json:
            print(json.dumps(found))
            continue
        print(f"{weights}: to the first token in {', '.join(f'{each:.2f}' for each in found['seconds'])} s")
        for name, count in found["parts_bytes"].items():
            print(f"  {count / 2**20:8.0f} MiB  {name}")
        beside = found["beside_weights_and_kv_bytes"] / 2**20
        print(
            f"  {found['peak_bytes'] / 2**20:8.0f} MiB  peak of the last start: {beside:.0f} MiB beside weights and KV"
        )
        first = found["first_peak_bytes"]
        print(f"  {first / 2**20:8.0f} MiB  peak of the first: {(first - found['peak_bytes']) / 2**20:.0f} MiB more")


if __name__ == "__main__":
    main()
