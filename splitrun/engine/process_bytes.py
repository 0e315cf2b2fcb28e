"""What a process takes before any model of the user's: of main memory Python, torch, transformers and an engine; of a
card the context with the kernels that are loaded there.

A process of its own runs the demo, gives it back, and says what it still holds. With a card named, embedding and head
run there, so that the driver's and the libraries' share is in the figures, and then some layers too, which load what
multiplies prompts; what compiling kernels takes is not, since measuring a model's units has compiled them before it is
run. Knows nothing of plans.
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
    """Bytes of main memory, and those of the card beside torch's own; 0 of a card where the driver does not tell.
    ``layers_host`` and ``layers_context`` are what layers on the card take more."""

    host: int
    context: int = 0
    layers_host: int = 0
    layers_context: int = 0


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
        return ProcessBytes(ASSUMED_BYTES * (2 if card else 1))


def main(card: str | None) -> None:
    """The process itself."""
    from splitrun.engine.engine import Engine
    from splitrun.measure.context import card_uses
    from splitrun.measure.probe import this_machine
    from splitrun.measure.resident import give_back, resident_bytes
    from splitrun.planner.facts import Workload
    from splitrun.planner.placement import ModelRef, Placement, StageSpec
    from splitrun.schedule.request import SamplingParams

    machine = this_machine()
    uses = card_uses(machine.torch, int(card.partition(":")[2]), machine.driver_free) if card else None

    def run(*stages: StageSpec) -> tuple[int, int]:
        """What is held of main memory afterwards, and of the card beside torch's own before it is given back."""
        plan = Placement(1, ModelRef("demo", layers=8), Workload(context=128), stages)
        with Engine(plan) as engine:
            engine.generate([list(range(5, 69))], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
            context = uses() if uses else 0
        give_back()
        return resident_bytes(), context

    if card is None:
        found = ProcessBytes(*run(StageSpec("cpu", True, (0, 8), True, "bf16")))
    else:
        head = StageSpec(card, False, (8, 8), True, "nf4")
        ends = run(StageSpec(card, True, (0, 0), False, "nf4"), StageSpec("cpu", False, (0, 8), False, "nf4"), head)
        half = run(StageSpec(card, True, (0, 4), False, "nf4"), StageSpec("cpu", False, (4, 8), False, "nf4"), head)
        found = ProcessBytes(*ends, *(max(0, more - less) for less, more in zip(ends, half, strict=True)))
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
