"""What the engine itself takes, of time and of memory: as it is kept between runs, and where a cluster pays for it.

Knows no engine: that measures it (``engine/own_seconds.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations

import torch

import splitrun
from splitrun.measure.cache import Cache, Figures
from splitrun.measure.code import code_digest
from splitrun.measure.versions import versions
from splitrun.planner.facts import Cluster, Device, Link

SECONDS = ("step_s", "warm_step_s", "request_s", "next_request_s", "hop_s")
BYTES = ("process_bytes", "card_process_bytes", "card_context_bytes", "card_layers_bytes", "card_layers_context_bytes")
FIGURES = (*SECONDS, *BYTES)
RUNNING = ("splitrun.engine", "splitrun.schedule", "splitrun.transport")
MEMORY_BYTES_PER_S = 1e15
"""Where nothing is copied."""


@dataclass(frozen=True)
class EngineCost:
    """What the engine itself takes.

    step_s              seconds per step beside stages and hops
    warm_step_s         the same where no stage on the processor has read so much that the caches hold nothing else
    request_s           seconds that the first token of a request takes more than a step, when nothing was asked for
    next_request_s      the same right behind another request
    hop_s               seconds of handing a step from one worker to the next
    process_bytes       main memory of its process before any model
    card_process_bytes  what it takes more once a card is in use
    card_context_bytes  of that card, the context with the kernels that are loaded there; 0 where nobody can tell
    card_layers_bytes, card_layers_context_bytes  the same two, more once layers compute there
    """

    step_s: float
    warm_step_s: float
    request_s: float
    next_request_s: float
    hop_s: float
    process_bytes: int
    card_process_bytes: int = 0
    card_context_bytes: int = 0
    card_layers_bytes: int = 0
    card_layers_context_bytes: int = 0


def known_cost(kept: Cache, card: str) -> EngineCost | None:
    """What was measured with the card in use, None when nothing was."""
    found = kept.get(cost_key(card))
    return cost_of(found) if found is not None and all(name in found for name in FIGURES) else None


def cost_key(card: str | None) -> str:
    """Under which the cache has the figures: they are those of this code over these libraries and this driver, and of
    such a card."""
    below = " ".join((f"splitrun {splitrun.__version__}", *versions("cuda" if card else "cpu")))
    return f"engine with {_described(card)} {below} code {code_digest(*RUNNING)}"


def _described(card: str | None) -> str:
    """Another card may have taken the name since."""
    if card is None or not torch.cuda.is_available():
        return card or "no card"
    properties = torch.cuda.get_device_properties(card)
    return f"{card} {properties.name} {properties.total_memory}"


def cost_of(found: Figures) -> EngineCost:
    """The figures as the cache has them."""
    step_s, warm_step_s, request_s, next_request_s, hop_s = (found[name] for name in SECONDS)
    sizes = (max(0, int(found[name])) for name in BYTES)
    return EngineCost(step_s, warm_step_s, request_s, next_request_s, hop_s, *sizes)


def with_engine(cluster: Cluster, cost: EngineCost) -> Cluster:
    """The cluster with what the engine takes: per step, on top of every link that two workers hand over on, of the
    processor's memory (further workers on it are threads of the same process), and of every card's for kernels."""
    first = next((device for device in cluster.devices if device.kind == "cuda"), None)
    kernels = cost.card_context_bytes - first.context_bytes if first is not None and cost.card_context_bytes else 0

    def paid(device: Device) -> Device:
        if device.kind == "cuda":
            context = max(0, device.context_bytes + kernels)
            device = replace(device, context_bytes=context, layers_context_bytes=cost.card_layers_context_bytes)
        if device.kind != "cpu" and device.memory_pool != device.name:  # shares main memory
            context = device.context_bytes + cost.process_bytes
            return replace(device, context_bytes=context, process_bytes=cost.process_bytes)
        return replace(device, context_bytes=cost.process_bytes) if device.name == "cpu" else device

    links = {pair: replace(link, latency_s=link.latency_s + cost.hop_s) for pair, link in cluster.links.items()}
    devices = tuple(map(paid, cluster.devices))
    # Workers of one process share main memory: nothing moves, the step is handed over.
    own = Link(latency_s=cost.hop_s, bandwidth_bytes_per_s=MEMORY_BYTES_PER_S)
    workers = [device.name for device in devices if device.kind == "cpu" and "/" not in device.name]
    links |= dict.fromkeys(permutations(workers, 2), own)
    return replace(
        cluster,
        devices=devices,
        links=links,
        step_s=cost.step_s,
        warm_step_s=cost.warm_step_s,
        request_s=cost.request_s,
        card_process_bytes=cost.card_process_bytes,
        card_layers_bytes=cost.card_layers_bytes,
    )
