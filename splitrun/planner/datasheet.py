"""Devices and links that are not here, from published figures: bandwidth, memory and arithmetic of well-known hardware.

Plans made from them are estimates: their intervals are wide, and the device says "datasheet". Knows no model.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from splitrun.errors import InvalidPlacement
from splitrun.planner.facts import FORMATS, Device, Link
from splitrun.quantities import parse_bytes

REACHED = 0.7
"""The share of published bandwidth and arithmetic that a model's layers are expected to reach."""
SPREAD = 0.4
UNIT_OVERHEAD_S: Mapping[str, float] = {"cpu": 0.1e-3, "cuda": 0.4e-3, "xpu": 0.8e-3, "mps": 0.8e-3}
"""Seconds per unit and token beside reading its weights: launching the small operations of one layer."""
CAPTURED_OVERHEAD_S, LEAST_CAPTURED = 40e-6, (7, 0)
"""The same where a layer's kernels are captured in a graph, from that compute capability on: five products, attention,
norms and rotary embedding, 3 to 8 us each as tests/bench/results/card.md has them, whatever they read."""
CONTEXT_BYTES: Mapping[str, int] = {"cpu": 490 << 20, "cuda": 300 << 20, "xpu": 150 << 20}
"""Of a processor: the process itself, Python and torch, as measured on one; of a card: what its driver takes."""
CARD_PROCESS_BYTES = 500 << 20
"""Main memory that the process takes more once it uses a CUDA card: driver, libraries, the compiler of kernels. No
sheet says it; it is what was measured beside another card."""
USABLE = {"cpu": 0.75, "cuda": 0.93, "xpu": 0.75}
"""The share of a device's memory that a plan may use: the system, and the screen, need the rest."""


@dataclass(frozen=True)
class Sheet:
    """One device's published figures; ``link`` names what joins it to its host."""

    name: str
    kind: str
    facts: Mapping[str, Any]

    @property
    def link(self) -> str:
        """The name of its link to the host."""
        return str(self.facts.get("link", "main memory"))

    @property
    def note(self) -> str:
        """What a user must know before buying; often empty."""
        return str(self.facts.get("note", ""))

    def device(self, name: str, pool: str) -> Device:
        """The device under that name; ``pool`` is its host's memory, for those that share it."""
        facts, kind = self.facts, self.kind
        total = parse_bytes(facts["memory"])
        capability = facts.get("capability")
        budget = int(total * USABLE[kind])
        shares = bool(facts.get("shares_host"))
        process = CONTEXT_BYTES["cpu"] if shares else 0
        return Device(
            name=name,
            kind=facts["kind"],
            description=f"{self.name} (datasheet)",
            total_bytes=total,
            free_bytes=budget,
            budget_bytes=budget,
            memory_pool=pool if kind == "cpu" or shares else name,
            context_bytes=CONTEXT_BYTES[kind] + process,
            process_bytes=process,
            bandwidth_bytes_per_s=facts["gb_per_s"] * 1e9 * REACHED,
            flops_per_s=facts["tflops"] * 1e12 * REACHED,
            unit_overhead_s=unit_overhead_s(kind, capability),
            compute_dtype=facts["dtype"],
            formats=FORMATS,
            compute_capability=(capability[0], capability[1]) if capability else None,
            spread=SPREAD,
            source="datasheet",
        )


def unit_overhead_s(kind: str, capability: Sequence[int] | None = None) -> float:
    """What a unit takes per token on such a device, however few bytes it reads."""
    if kind == "cuda" and capability is not None and tuple(capability) >= LEAST_CAPTURED:
        return CAPTURED_OVERHEAD_S
    return UNIT_OVERHEAD_S[kind]


def find_device(name: str, what: str, listed: Sequence[str] = ("gpus", "cpus")) -> Sheet:
    """The sheet of that name, letter case and blanks aside. Raises InvalidPlacement with the nearest names, or with
    those of the tables that are ``listed`` where none is near."""
    known = {**_read("gpus"), **_read("cpus")}
    facts = _pick(known, name, what, [each for table in listed for each in _read(table)])
    return Sheet(facts[0], str(facts[1]["kind"]), facts[1])


def find_link(name: str, what: str = "--link") -> Link:
    """The link of that name. Raises InvalidPlacement with the nearest names."""
    facts = _pick(_read("links"), name, what)[1]
    return Link(facts["latency_us"] * 1e-6, facts["gb_per_s"] * 1e9)


def device_names() -> tuple[str, ...]:
    """Every device that is known."""
    return (*_read("gpus"), *_read("cpus"))


def _pick(
    known: Mapping[str, Mapping[str, Any]], name: str, what: str, listed: Sequence[str] = ()
) -> tuple[str, Mapping[str, Any]]:
    plain = {_plain(key): key for key in known}
    found = plain.get(_plain(name))
    if found is None:
        near = difflib.get_close_matches(_plain(name[:60]), list(plain), n=3, cutoff=0.4)
        nearest = f"did you mean {' or '.join(plain[each] for each in near)}?"
        raise InvalidPlacement(
            f"{what} {name[:60]!r} is not known; {nearest if near else 'known: ' + ', '.join(listed or known)}"
        )
    return found, known[found]


def _plain(name: str) -> str:
    word = "".join(name.lower().split())
    for maker in ("nvidia", "geforce", "intel"):
        word = word.removeprefix(maker)
    return word.replace("gib", "gb")


@cache
def _read(name: str) -> Mapping[str, Mapping[str, Any]]:
    file = resources.files("splitrun.planner.datasheets") / f"{name}.json"
    content: Mapping[str, Mapping[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return content
