"""What a process takes before any model of the user's: of main memory Python, torch, transformers and an engine; of a
card the context with the kernels that are loaded there.

A process of its own runs the demo, gives it back, and says what it still holds. With a card named, embedding, some
layers and the head run there, so that the driver's and the libraries' share is in the figures; what compiling kernels
takes is not, since measuring a model's units has compiled them before it is run. Knows nothing of plans.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass

from splitrun.child import child_command, child_environment

TIMEOUT_S = 240.0
ASSUMED_BYTES = 512 << 20
"""Of main memory, where it cannot be measured; as much again with a card."""


@dataclass(frozen=True)
class ProcessBytes:
    """Bytes of main memory, and those of the card beside torch's own; 0 of a card where the driver does not tell."""

    host: int
    context: int


def process_bytes(card: str | None) -> ProcessBytes:
    """What a process takes with ``card`` in use beside the processor."""
    if card is not None:
        _run(card)  # compiles the kernels
    return _run(card)


def _run(card: str | None) -> ProcessBytes:
    command = [*child_command("splitrun.engine.process_bytes"), *([card] if card else [])]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S, env=child_environment()
        )
        return ProcessBytes(**json.loads(done.stdout.splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, TypeError, IndexError):
        return ProcessBytes(ASSUMED_BYTES * (2 if card else 1), 0)


def main(card: str | None) -> None:
    """The process itself."""
    from splitrun.engine.engine import Engine
    from splitrun.measure.context import card_uses
    from splitrun.measure.probe import this_machine
    from splitrun.measure.resident import give_back, resident_bytes
    from splitrun.planner.facts import Workload
    from splitrun.planner.placement import ModelRef, Placement, StageSpec
    from splitrun.schedule.request import SamplingParams

    stages: tuple[StageSpec, ...] = (StageSpec("cpu", True, (0, 8), True, "bf16"),)
    if card is not None:
        stages = (
            StageSpec(card, True, (0, 4), False, "nf4"),
            StageSpec("cpu", False, (4, 8), False, "nf4"),
            StageSpec(card, False, (8, 8), True, "nf4"),
        )
    machine = this_machine()
    uses = card_uses(machine.torch, int(card.partition(":")[2]), machine.driver_free) if card else None
    plan = Placement(1, ModelRef("demo", layers=8), Workload(context=128), stages)
    with Engine(plan) as engine:
        engine.generate([[5, 6, 7]], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
        context = uses() if uses else 0
    give_back()
    print(json.dumps(asdict(ProcessBytes(resident_bytes(), context))))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
