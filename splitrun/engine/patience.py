"""How long is waited for stages elsewhere, where the coordinator listens for them, and whom it asks when they are lost
for good."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Patience:
    """How often signs of life come, and when they are missed.

    beat_s        between two heartbeats of a stage process
    dead_after_s  silence after which a running process is given up
    start_s       silence after which one that is being started is given up
    stall_s       time without any stage at work after which a step that is under way counts as lost
    starts        attempts to start a lost process; also how often one may be lost before a token has come through
    """

    beat_s: float = 0.5
    dead_after_s: float = 2.0
    start_s: float = 20.0
    stall_s: float = 10.0
    starts: int = 3


@dataclass(frozen=True)
class Listening:
    """An address of a machine, and the ports to choose from there."""

    host: str
    ports: tuple[int, int]


LOOPBACK = Listening("127.0.0.1", (49152, 65535))


class Successor(Protocol):
    """Knows what becomes of stages whose devices are lost for good."""

    def take_over(self, devices: Collection[str]) -> bool:
        """Let the running pipeline's stages of these devices be computed in this process; False when they cannot."""

    def replace(self, reason: str, devices: Collection[str]) -> None:
        """Bring up all stages anew without these devices, on another thread."""
