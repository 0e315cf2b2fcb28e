"""The facts a plan is made from: devices, links, and the units of a model. Plain data, no torch, no measuring.

A model of n layers has n + 2 units in a fixed order: ``embed``, ``layer 0`` … ``layer n-1``, ``head``. All facts are
per unit, so the solver has no special cases. Sizes are in bytes (``_bytes``), durations in seconds (``_s``); a
*value* is one number of a tensor whatever its type, so that bytes follow from the format or type chosen later.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from splitrun.planner.peaks import UnitPeak
from splitrun.planner.seconds import DeviceSeconds

FORMATS = ("fp32", "bf16", "fp16", "int8", "nf4")
"""Weight formats, most precise first."""

VALUE_BYTES: Mapping[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of one value in each type that activations and KV may have."""
KV_TYPES = (*VALUE_BYTES, "int8")
"""Types of stored K and V: int8 has a scale for each head's K and for its V."""
SCALE_BYTES = 4

Objective = Literal["latency", "throughput", "first-token"]


@dataclass(frozen=True)
class Device:
    """One place where a stage can run.

    ``memory_pool`` names the memory that the device draws on: the CPU and every integrated GPU are in "host" and share
    one budget; a discrete GPU is in a pool of its own name. ``budget_bytes`` is what the plan may use there, the
    device's context included: ``context_bytes``, which driver and runtime take before the first tensor (of a
    processor: what the process itself takes, Python and torch). ``spread`` is how far, as a share, predictions from
    these figures may be off; ``source`` says where the figures come from: "bandwidth" (measured on the device, but not
    with the model's layers) or "datasheet". ``kv_dtype`` is what K and V are to be stored in there; None: the type that
    is computed in. ``layers_context_bytes`` is what a card's context grows by once layers compute there, which load a
    library for prompts that embedding and head do without; ``holds_layers`` says whether they may. ``process_bytes``:
    what of its context is the process, on a device that shares main memory, and which the processor pays where it is in
    use; the search counts it twice then, the plan's bill does not.
    """

    name: str
    kind: Literal["cpu", "cuda", "xpu", "mps"]
    description: str
    total_bytes: int
    free_bytes: int
    budget_bytes: int
    memory_pool: str
    context_bytes: int
    bandwidth_bytes_per_s: float
    flops_per_s: float
    unit_overhead_s: float
    compute_dtype: Literal["fp32", "bf16", "fp16"]
    formats: tuple[str, ...] = FORMATS
    compute_capability: tuple[int, int] | None = None
    spread: float = 0.25
    source: str = "bandwidth"
    kv_dtype: Literal["int8"] | None = None
    layers_context_bytes: int = 0
    holds_layers: bool = True
    process_bytes: int = 0

    def in_use(self, layers: bool, beside_cpu: bool = False) -> Device:
        """The same, its context as large as it is with layers there or without, beside a processor that pays for the
        process or without."""
        more = self.layers_context_bytes if layers else 0
        return replace(self, context_bytes=self.context_bytes + more - (self.process_bytes if beside_cpu else 0))


@dataclass(frozen=True)
class Link:
    """What it takes to move an activation from one device to another: ``latency_s + bytes / bandwidth``."""

    latency_s: float
    bandwidth_bytes_per_s: float


@dataclass(frozen=True)
class Cluster:
    """The devices at hand and the links between them. Pairs that are not listed use ``default_link``.

    ``step_s`` is what the engine itself takes per step: scheduling, hand-overs between threads, handing out tokens;
    ``warm_step_s`` the same where all layers and the head are on accelerators, so that the processor's caches keep what
    it needs; None: as much. ``request_s`` is what the first token of a request takes more than that.
    ``card_process_bytes`` is the main memory that the process takes more once it uses a CUDA card of this machine:
    driver, libraries; ``card_layers_bytes`` is what it takes beyond that once layers compute there.
    """

    devices: tuple[Device, ...]
    links: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    default_link: Link = Link(latency_s=20e-6, bandwidth_bytes_per_s=5e9)
    step_s: float = 0.0
    warm_step_s: float | None = None
    request_s: float = 0.0
    card_process_bytes: int = 0
    card_layers_bytes: int = 0

    def local_cards(self) -> tuple[str, ...]:
        """Names of the CUDA cards of this machine."""
        return tuple(device.name for device in self.devices if device.kind == "cuda" and "/" not in device.name)

    def with_card_in_use(self, layers: bool) -> Cluster:
        """The same, the processor paying already for a card in use, on which layers may compute or may not."""
        cards, more = self.local_cards(), self.card_process_bytes + (self.card_layers_bytes if layers else 0)

        def paid(device: Device) -> Device:
            if device.name == "cpu":
                return replace(device, context_bytes=device.context_bytes + more)
            return replace(device, holds_layers=layers and device.holds_layers) if device.name in cards else device

        return replace(self, devices=tuple(map(paid, self.devices)), card_process_bytes=0, card_layers_bytes=0)

    def without(self, names: Collection[str]) -> Cluster:
        """The same without those devices."""
        return replace(self, devices=tuple(device for device in self.devices if device.name not in names))

    def keeping(self, kv: str) -> Cluster:
        """With "int8", the same whose processors keep K and V in int8; otherwise itself."""
        if kv != "int8":
            return self
        kept = (replace(device, kv_dtype="int8") if device.kind == "cpu" else device for device in self.devices)
        return replace(self, devices=tuple(kept))

    def device(self, name: str) -> Device:
        """The device of that name; KeyError when there is none."""
        for device in self.devices:
            if device.name == name:
                return device
        raise KeyError(name)

    def link(self, source: str, target: str) -> Link:
        """The link between two devices, by name."""
        return self.links.get((source, target), self.default_link)


@dataclass(frozen=True)
class KVGroup:
    """Layers whose KV is kept by the same rule.

    full     every token is kept
    sliding  the last ``window`` tokens are kept
    latent   every token, as the compressed K and V of multi-head latent attention
    state    a fixed state per sequence (linear attention, convolutions), no matter how long it is
    """

    kind: Literal["full", "sliding", "latent", "state"]
    window: int | None = None

    @property
    def name(self) -> str:
        """ "full", "sliding(1024)", "latent" or "state"."""
        return f"sliding({self.window})" if self.kind == "sliding" else self.kind


@dataclass(frozen=True)
class UnitProfile:
    """One unit's facts.

    weight_bytes                 format -> bytes the unit occupies when loaded in that format
    read_bytes                   format -> weight bytes that one decoded token reads (a row of an embedding table, the
                                 active experts of a mixture, otherwise all)
    flops_per_token              floating-point operations per token, attention over the history excluded
    kv_values_per_token          KV group name -> values of K and V stored per token
    kv_heads                     heads of K and of V together: so many scales a token has in int8
    state_bytes                  bytes of state per sequence (group "state")
    activation_values_per_token  largest intermediate inside the unit, in values per token (workspace)
    largest_weight_values        largest matrix of the unit (a quantized product may dequantize one at a time)
    quantized_values             weights that int8 and nf4 apply to; the others stay in the compute type
    heads_per_kv                 query heads that share a K and V head: attention may spread the history over them
    score_heads                  heads whose scores attention writes out, 0 where it works on tiles (SDPA)
    """

    name: str
    weight_bytes: Mapping[str, int]
    read_bytes: Mapping[str, int]
    flops_per_token: float
    kv_values_per_token: Mapping[str, int] = field(default_factory=dict)
    state_bytes: int = 0
    activation_values_per_token: int = 0
    largest_weight_values: int = 0
    quantized_values: int = 0
    heads_per_kv: int = 1
    score_heads: int = 0
    kv_heads: int = 0


@dataclass(frozen=True)
class Factor:
    """What measured seconds of units were multiplied with, because a run took so much more: decoded tokens, prompts.
    ``borrowed``: a run of the device's other formats."""

    decode: float = 1.0
    prefill: float = 1.0
    borrowed: bool = False


@dataclass(frozen=True)
class ModelProfile:
    """A model as the planner sees it.

    ``tied_bytes``: format -> bytes of the tensors that embed and head share; a device that holds both in one format
    pays them once. ``fingerprint`` identifies config and tensor headers. ``stored_format`` is the format of the
    checkpoint: "nf4" and "int8" for checkpoints already quantized, which load as they are and as nothing else.
    ``seconds``: (device, format) -> what was measured there; where there is nothing, bandwidths decide. ``peaks``:
    (device, format) -> measured temporary bytes of each unit; where there is nothing, shapes decide. ``factors``:
    (device, format) -> what its ``seconds`` were multiplied with.
    """

    source: str
    revision: str | None
    fingerprint: str
    model_type: str
    units: tuple[UnitProfile, ...]
    groups: tuple[KVGroup, ...]
    hidden_values: int
    vocabulary: int
    max_context: int
    stored_format: str
    tied_bytes: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[tuple[str, str], DeviceSeconds] = field(default_factory=dict)
    peaks: Mapping[tuple[str, str], tuple[UnitPeak, ...]] = field(default_factory=dict)
    factors: Mapping[tuple[str, str], Factor] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """Number of layers: the units without embed and head."""
        return len(self.units) - 2

    def of_devices(self, names: Collection[str]) -> ModelProfile:
        """The same without what was measured on other devices."""
        seconds = {place: found for place, found in self.seconds.items() if place[0] in names}
        peaks = {place: found for place, found in self.peaks.items() if place[0] in names}
        factors = {place: found for place, found in self.factors.items() if place[0] in names}
        return replace(self, seconds=seconds, peaks=peaks, factors=factors)

    @cached_property
    def kinds(self) -> tuple[int, ...]:
        """Unit -> the first layer whose facts differ from its own in nothing but the name; embed and head: itself."""
        first: list[int] = []
        facts = [replace(unit, name="") for unit in self.units]
        found = [0]
        for layer in range(1, self.layers + 1):
            kind = next((number for number in first if facts[number] == facts[layer]), layer)
            first += [layer] if kind == layer else []
            found.append(kind)
        return (*found, self.layers + 1)


@dataclass(frozen=True)
class Workload:
    """What the plan must hold: ``sessions`` sequences of up to ``context`` tokens at once, prompts in chunks.

    ``history_tokens`` and ``prompt_tokens`` are what predicted figures are for; None: half the context, and a prompt
    of 512 tokens or the context where that is shorter.
    """

    context: int = 4096
    sessions: int = 1
    objective: Objective = "latency"
    chunk_tokens: int = 512
    block_tokens: int = 64
    history_tokens: int | None = None
    prompt_tokens: int | None = None
