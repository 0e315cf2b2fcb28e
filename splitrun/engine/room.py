"""Is there room for what a placement asks, before anything is allocated, and for KV of other machines.

Counts weights, KV blocks and states exactly, as loading will take them, against the budgets of the plan and what is
free now; workspace is the planner's to foresee. Knows shapes, not files.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch

from splitrun.engine.loading import compute_dtype
from splitrun.errors import DoesNotFit
from splitrun.kernels.formats import weight_bytes
from splitrun.measure.host import read_host_memory
from splitrun.measure.resident import resident_bytes
from splitrun.model.cut import CutRange
from splitrun.model.structure import LayerCache, ModelStructure
from splitrun.planner.keeping import KEEPER, elsewhere, journal_bytes, senders, shares
from splitrun.planner.kv import stored_bytes
from splitrun.planner.memory import stage_dtype
from splitrun.planner.placement import Placement, StageSpec
from splitrun.quantities import format_bytes
from splitrun.transport.local import torch_device


def require_room(placement: Placement, structure: ModelStructure, blocks: Mapping[str, int]) -> None:
    """Raise DoesNotFit when a device's stages in this process need more than its budget, or than is free there.

    ``blocks`` are the blocks per KV group.
    """
    needed: dict[str, int] = {}
    tied: set[tuple[str, str, str]] = set()
    for stage in placement.stages:
        if not elsewhere(stage.device):
            size = _weight_bytes(stage, structure, tied) + _history_bytes(stage, placement, structure, blocks)
            needed[stage.device] = needed.get(stage.device, 0) + size
    for device, size in needed.items():
        budget = placement.devices.get(device)
        if budget is not None and size > budget:
            raise _does_not_fit(placement, device, size, budget, "its budget is")
    host = sum(size for device, size in needed.items() if torch_device(device) == "cpu")
    pools = {device: size for device, size in needed.items() if torch_device(device) != "cpu"}
    for device, size in ({"cpu": host} | pools).items():
        free = _free_bytes(device)
        if free is not None and size > free:
            raise _does_not_fit(placement, device, size, free, "free there are")


def _weight_bytes(stage: StageSpec, structure: ModelStructure, tied: set[tuple[str, str, str]]) -> int:
    """Bytes of a stage's tensors; one that the device holds already under another name costs nothing more."""
    cut = CutRange(stage.embed, stage.layers[0], stage.layers[1], stage.head)
    units = set(cut.units(structure.layers))
    dtype = _dtype(stage)
    total = 0
    for info in structure.parameters:
        key = (torch_device(stage.device), stage.weights, info.tied_to or info.name)
        if info.unit in units and key not in tied:
            tied.add(key)
            total += weight_bytes(info.shape, stage.weights, dtype, info.covered)
    return total


def _history_bytes(stage: StageSpec, placement: Placement, structure: ModelStructure, blocks: Mapping[str, int]) -> int:
    """Bytes of a stage's KV blocks and state slots."""
    workload = placement.workload
    total = 0
    for cache in structure.caches[stage.layers[0] : stage.layers[1]]:
        total += cache.state_bytes * workload.sessions
        if cache.group is not None:
            total += blocks[cache.group.name] * workload.block_tokens * _token_bytes(stage, cache)
    return total


def _token_bytes(stage: StageSpec, cache: LayerCache) -> int:
    """Bytes of a layer's K and V of one token."""
    return stored_bytes(cache.values_per_token, cache.kv_heads, stage.kv.dtype or _dtype(stage))


def kept_room(
    placement: Placement, structure: ModelStructure, blocks: Mapping[str, int], journals: bool
) -> dict[int, int]:
    """Stage in another process, with KV -> how many bytes of it may be kept here: all, or 0 where there is no room.

    Room is what the plan leaves, less what ``journals`` take, and no more than half of what is free. States cannot go
    back to an earlier token: of models with states nothing is kept.
    """
    room = _room(KEEPER, placement, structure, blocks) - journals * _journal_bytes(KEEPER, placement, structure)
    room = min(room, (_free_bytes(KEEPER) or 0) // 2)
    if any(cache.states for cache in structure.caches):
        room = 0
    workload = placement.workload
    whole = [blocks[group.name] for group in structure.groups if group.kind in ("full", "latent")]
    tokens = max(whole) * workload.block_tokens if whole else workload.sessions * workload.context
    needed = {}
    for index, stage in enumerate(placement.stages):
        width = sum(_token_bytes(stage, cache) for cache in structure.caches[stage.layers[0] : stage.layers[1]])
        if elsewhere(stage.device) and width:
            needed[index] = width * tokens
    return shares(needed, room)


def journals_fit(placement: Placement, structure: ModelStructure, blocks: Mapping[str, int]) -> bool:
    """Whether every stage before one in another process may keep what it sends: the plan leaves room for it. A card's
    host memory is not planned."""
    return all(
        _journal_bytes(device, placement, structure) <= _room(device, placement, structure, blocks)
        for device in {stage.device for stage in senders(placement)}
    )


def _journal_bytes(device: str, placement: Placement, structure: ModelStructure) -> int:
    """Bytes of what a device sends to stages in other processes."""
    own = [stage for stage in senders(placement) if stage.device == device]
    return sum(journal_bytes(placement.workload, structure.hidden, _dtype(stage)) for stage in own)


def _room(device: str, placement: Placement, structure: ModelStructure, blocks: Mapping[str, int]) -> int:
    """Bytes of the device's budget that are left beside everything else: by the plan's bill, or without one beside
    weights, KV, and this process where it is the device's."""
    budget = placement.devices.get(device)
    estimate = placement.estimate
    for bill in estimate.devices if estimate is not None else ():
        if bill.device == device:
            return (budget or bill.budget_bytes) - bill.total_bytes + bill.kept_bytes
    if budget is None:
        return sys.maxsize
    tied: set[tuple[str, str, str]] = set()
    own = [stage for stage in placement.stages if stage.device == device]
    held = sum(_weight_bytes(stage, structure, tied) for stage in own)
    held += sum(_history_bytes(stage, placement, structure, blocks) for stage in own)
    return budget - held - (0 if elsewhere(device) else resident_bytes())


def _dtype(stage: StageSpec) -> str:
    """The type a stage computes in; elsewhere, one that takes as much room."""
    if elsewhere(stage.device):
        return stage_dtype("bf16", stage.weights)
    return compute_dtype(stage.device, stage.weights)


def _free_bytes(device: str) -> int | None:
    """What is free on a device now; None where it cannot be asked."""
    if device == "cpu":
        return read_host_memory().free_bytes
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return None


def _does_not_fit(placement: Placement, device: str, needed: int, room: int, what: str) -> DoesNotFit:
    workload = placement.workload
    fewer = f", fewer sessions (now {workload.sessions})" if workload.sessions > 1 else ""
    return DoesNotFit(
        f"weights and KV of {device} take {format_bytes(needed)}, but {what} {format_bytes(room)}: give it more, or "
        f"plan again with a shorter context (now {workload.context}){fewer} or leaner weights",
        {device: needed - room},
    )
