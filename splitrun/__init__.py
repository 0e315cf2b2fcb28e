"""splitrun: plan a language model over the devices at hand, then serve exactly that plan.

The public names are loaded on first use, so that ``import splitrun`` costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitrun.api import plan
    from splitrun.engine.engine import Completion, Engine
    from splitrun.errors import SplitrunError
    from splitrun.planner.placement import Placement
    from splitrun.schedule.request import SamplingParams, TokenEvent

__version__ = "0.1.0"

_HOMES = {
    "plan": "splitrun.api",
    "Engine": "splitrun.engine.engine",
    "Completion": "splitrun.engine.engine",
    "Placement": "splitrun.planner.placement",
    "SamplingParams": "splitrun.schedule.request",
    "TokenEvent": "splitrun.schedule.request",
    "SplitrunError": "splitrun.errors",
}

__all__ = ["Completion", "Engine", "Placement", "SamplingParams", "SplitrunError", "TokenEvent", "__version__", "plan"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'splitrun' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
