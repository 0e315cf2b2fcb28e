"""What a process takes of main memory before any model of the user's: Python, torch, transformers, an engine.

A process of its own runs the demo, gives it back, and says what it still holds. With a card named, the demo's first
layers run there, so that the driver's and the libraries' share is in the figure. Knows nothing of plans.
"""

from __future__ import annotations

import subprocess
import sys

from splitrun.child import child_command, child_environment

TIMEOUT_S = 120.0
ASSUMED_BYTES = 512 << 20
"""Where it cannot be measured."""


def process_bytes(card: str | None) -> int:
    """Bytes of main memory, with ``card`` in use beside the processor."""
    command = [*child_command("splitrun.engine.process_bytes"), *([card] if card else [])]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S, env=child_environment()
        )
        return int(done.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return ASSUMED_BYTES


def main(card: str | None) -> None:
    """The process itself."""
    from splitrun.engine.engine import Engine
    from splitrun.measure.resident import give_back, resident_bytes
    from splitrun.planner.facts import Workload
    from splitrun.planner.placement import ModelRef, Placement, StageSpec
    from splitrun.schedule.request import SamplingParams

    stages: tuple[StageSpec, ...] = (StageSpec("cpu", True, (0, 8), True, "bf16"),)
    if card is not None:
        stages = (StageSpec(card, True, (0, 4), False, "bf16"), StageSpec("cpu", False, (4, 8), True, "bf16"))
    plan = Placement(1, ModelRef("demo", layers=8), Workload(context=128), stages)
    with Engine(plan) as engine:
        engine.generate([[5, 6, 7]], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
    give_back()
    print(resident_bytes())


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
