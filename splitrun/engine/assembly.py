"""From a placement to a running engine core: workers, stages, hops, scheduler.

The only place that joins the plan's numbers to the model's files. Nothing is loaded before the plan is known to suit
the model and the model is known to be cut exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from shlex import quote

import torch

from splitrun.cluster.process import machine_of
from splitrun.engine.core import EngineCore
from splitrun.engine.lineup import LineUp, require_nodes
from splitrun.engine.loading import Load, pool_sizes, stage_name
from splitrun.engine.patience import Patience
from splitrun.engine.succession import Succession
from splitrun.errors import InvalidPlacement
from splitrun.measure.profile import max_context
from splitrun.model.files import ModelFiles
from splitrun.model.payload import headers_of
from splitrun.model.structure import ModelStructure, inspect
from splitrun.planner.placement import STREAM_FROM_TOKENS, Placement, StageSpec
from splitrun.schedule.scheduler import GroupSpec, Limits, Scheduler
from splitrun.stage.proof import prove


def assemble(
    placement: Placement,
    files: ModelFiles,
    *,
    load: Load,
    depth: int | None,
    chunk_tokens: int,
    patience: Patience,
    rebalance: bool = False,
    trace: bool = False,
) -> EngineCore:
    """A running engine core for the placement, warmed up by one real token.

    ``load`` "dummy" makes random weights instead of reading them. ``depth`` is the number of steps in flight and of
    the streams that decode, by default one per worker and the placement's; ``patience`` is for stages in processes of
    their own, ``rebalance`` for nodes that come back; ``trace``: stages elsewhere tell what they do when. Raises
    InvalidPlacement when the plan is stale, ModelError when the model cannot be cut or loaded, DeviceOutOfMemory when a
    device is too small after all, StageLost when a stage process does not come up.
    """
    for spec in placement.stages:
        _require_possible(spec)
    require_nodes(placement)
    if load == "weights":
        _require_same_model(placement, files)
    traits = prove(files.config)
    structure = inspect(files.config)
    _require_suitable(placement, files, structure)
    blocks = pool_sizes(placement, structure)
    streams = depth or placement.streams
    depth = depth or len(placement.device_names)
    scheduler = _scheduler(placement, structure, blocks, depth, streams, chunk_tokens)
    lineup = LineUp(files, structure, traits, load, depth, chunk_tokens, patience, trace)
    succession = Succession(lineup, placement, rebalance)
    with ExitStack() as undo:
        line = lineup.bring_up(placement, succession)
        undo.callback(line.close)
        core = EngineCore(scheduler, line)
        undo.pop_all()
        undo.callback(core.close)
        succession.attach(core, line)
        core.warm_up()
        undo.pop_all()
    return core


def _require_same_model(placement: Placement, files: ModelFiles) -> None:
    """Raise InvalidPlacement when the files are not those that were planned."""
    if headers_of(placement.model.fingerprint) not in (None, files.fingerprint):
        raise InvalidPlacement(
            f"{placement.model.source} changed since it was planned: plan again with "
            f"splitrun plan {quote(placement.model.source)} --context {placement.workload.context} -o FILE"
        )


def _require_suitable(placement: Placement, files: ModelFiles, structure: ModelStructure) -> None:
    """Raise InvalidPlacement when layers or context do not suit the model."""
    source = placement.model.source
    if placement.layers != structure.layers:
        raise InvalidPlacement(f"the placement splits {placement.layers} layers, but {source} has {structure.layers}")
    longest = max_context(files.config)
    if placement.workload.context > longest:
        raise InvalidPlacement(
            f"the placement holds {placement.workload.context} tokens, but {source} computes at most {longest} "
            f"exactly: plan again with --context {longest}"
        )


def _scheduler(
    placement: Placement,
    structure: ModelStructure,
    blocks: Mapping[str, int],
    depth: int,
    streams: int | None,
    chunk_tokens: int,
) -> Scheduler:
    limits = Limits(
        context=placement.workload.context,
        sessions=placement.workload.sessions,
        vocabulary=structure.vocabulary,
        chunk_tokens=chunk_tokens,
        block_tokens=placement.workload.block_tokens,
        depth=depth,
        streams=streams,
    )
    paged = [group for group in structure.groups if group.kind != "state"]
    groups = tuple(GroupSpec(group.name, group.window, blocks[group.name]) for group in paged)
    return Scheduler(groups, limits, states=any(cache.states for cache in structure.caches))


def _require_possible(spec: StageSpec) -> None:
    """Refuse what this machine or this version cannot do. Raises InvalidPlacement."""
    kind, _, number = spec.device.rpartition("/")[2].partition(":")
    counts = {
        "cpu": 1 << 16,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "xpu": torch.xpu.device_count() if torch.xpu.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }
    if spec.stream_from_tokens != STREAM_FROM_TOKENS and kind != "cpu":
        raise InvalidPlacement(
            f"{stage_name(spec)}: stream_from {spec.stream_from_tokens} is for layers on the processor, whose prompts "
            "a card computes: leave it out here"
        )
    if not machine_of(spec.device) and int(number or 0) >= counts[kind]:
        raise InvalidPlacement(
            f"{stage_name(spec)}: there is no such device here; `splitrun doctor` lists those there are"
        )
    unused = {"kv.host_blocks": spec.kv.host_blocks, "kv.disk_blocks": spec.kv.disk_blocks}
    if spec.stream_buffer_bytes and kind == "cpu":
        raise InvalidPlacement(
            f"{stage_name(spec)}: stream_buffer {spec.stream_buffer_bytes} is memory of a card, which computes prompts "
            "of layers on the processor: set it to 0 here"
        )
    for key, value in unused.items():
        if value:
            raise InvalidPlacement(f"{stage_name(spec)}: {key} {value} is not supported by this version: set it to 0")
