"""Predicted beside measured after an engine has run: what the stages took for a token of one sequence alone.

Knows the plan's estimate and the engine's clocks; measures nothing itself. Stages are added up, because the one behind
a card waits for the card on its own clock.
"""

from __future__ import annotations

from splitrun.engine.interface import EngineStatus
from splitrun.planner.placement import Placement
from splitrun.quantities import format_seconds

LEAST_STEPS = 16
"""Fewer tokens say nothing."""


def predicted_and_measured(placement: Placement, status: EngineStatus) -> str:
    """One line; empty without an estimate, or when too few tokens were computed alone."""
    stored = placement.estimate
    steps = min((stage.single_steps for stage in status.stages), default=0)
    if stored is None or steps < LEAST_STEPS:
        return ""
    predicted = sum(stage.decode_s + stage.hop_s for stage in stored.stages)
    measured = sum(stage.single_step_ms for stage in status.stages) / 1e3
    return (
        f"a token alone: {format_seconds(predicted)} predicted after {stored.history_tokens:,} others, "
        f"{format_seconds(measured)} measured over {steps:,} tokens ({predicted / max(measured, 1e-9) - 1:+.0%}); "
        "splitrun plan --calibrate folds such differences in"
    )
