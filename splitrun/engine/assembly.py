"""From a placement to a running engine core: workers, stages, hops, scheduler.

The only place that joins the plan's numbers to the model's files. Nothing is loaded before the plan is known to suit
the model and the model is known to be cut exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial

import torch
import yaml

from splitrun.cluster.process import LOCAL_NODE, StageProcess
from splitrun.engine.core import EngineCore
from splitrun.engine.exchange import COORDINATOR
from splitrun.engine.interface import StageStatus
from splitrun.engine.loading import (
    Load,
    Ring,
    StageLoading,
    load_stages,
    make_links,
    pool_sizes,
    stage_name,
    worker_threads,
)
from splitrun.engine.pipeline import Link, Outcome, Pipeline, RemoteLink
from splitrun.engine.remote import Patience, RemoteStages
from splitrun.engine.room import require_room
from splitrun.errors import InvalidPlacement
from splitrun.measure.profile import max_context
from splitrun.model.files import ModelFiles
from splitrun.model.structure import ModelStructure, inspect
from splitrun.planner.placement import Placement, StageSpec
from splitrun.planner.placement_file import dump
from splitrun.schedule.scheduler import GroupSpec, Limits, Scheduler
from splitrun.stage.proof import prove


def assemble(
    placement: Placement, files: ModelFiles, *, load: Load, depth: int | None, chunk_tokens: int, patience: Patience
) -> EngineCore:
    """A running engine core for the placement, warmed up by one real token.

    ``load`` "dummy" makes random weights instead of reading them. ``depth`` is the number of steps in flight, by
    default one per worker; ``patience`` is for stages in processes of their own. Raises InvalidPlacement when the plan
    is stale, ModelError when the model cannot be cut or loaded, DeviceOutOfMemory when a device is too small after
    all, StageLost when a stage process does not come up.
    """
    for spec in placement.stages:
        _require_possible(spec)
    if load == "weights":
        _require_same_model(placement, files)
    traits = prove(files.config)
    structure = inspect(files.config)
    _require_suitable(placement, files, structure)
    blocks = pool_sizes(placement, structure)
    require_room(placement, structure, blocks)
    depth = depth or len(placement.device_names)
    scheduler = _scheduler(placement, structure, blocks, depth, chunk_tokens)
    loading = StageLoading(placement, files, structure, blocks, load, traits)
    threads = {name: worker_threads(placement, name) for name in placement.device_names}
    remote = _remote_stages(placement, threads, patience, load=load, depth=depth, chunk_tokens=chunk_tokens,
                            traits=asdict(traits))  # fmt: skip
    with ExitStack() as undo:
        if remote is not None:
            remote.start()
            undo.callback(remote.close)
        loaded = load_stages(loading, placement, {name: count for name, count in threads.items() if "/" not in name})
        undo.callback(loaded.close)
        ring = Ring.of(placement, structure.hidden, depth, chunk_tokens)
        links = make_links(placement, loaded, remote.send if remote is not None else None, ring)
        memory = {index: loaded.memory_bytes(index) for index in loaded.stages} | (
            remote.memory_bytes if remote else {}
        )
        statuses = tuple(
            StageStatus(spec.device, spec.units_text, memory[index]) for index, spec in enumerate(placement.stages)
        )
        core = EngineCore(scheduler, partial(_pipeline, links, remote), statuses, yaml.safe_load(dump(placement)))
        undo.pop_all()
        undo.callback(core.close)
        core.warm_up()
        undo.pop_all()
    return core


def _pipeline(
    links: Sequence[Link | RemoteLink], remote: RemoteStages | None, deliver: Callable[[Outcome], None]
) -> Pipeline:
    if remote is None:
        return Pipeline(links, deliver)
    pipeline = Pipeline(links, remote.outcome, remote)
    remote.run(pipeline, deliver)
    return pipeline


def _remote_stages(
    placement: Placement, threads: Mapping[str, int | None], patience: Patience, **settings: object
) -> RemoteStages | None:
    """The stages that a placement gives to processes of their own, not started; None when there are none."""
    devices = [name for name in placement.device_names if "/" in name]
    if not devices:
        return None
    text = dump(replace(placement, estimate=None))
    jobs = {device: {**settings, "placement": text, "threads": threads[device]} for device in devices}
    peers = tuple(spec.device if "/" in spec.device else COORDINATOR for spec in placement.stages)
    return RemoteStages(peers, jobs, StageProcess, patience)


def _require_same_model(placement: Placement, files: ModelFiles) -> None:
    """Raise InvalidPlacement when the files are not those that were planned."""
    if placement.model.fingerprint not in (None, files.fingerprint):
        raise InvalidPlacement(
            f"{placement.model.source} changed since it was planned: plan again with "
            f"splitrun plan {placement.model.source} --context {placement.workload.context} -o FILE"
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
    placement: Placement, structure: ModelStructure, blocks: Mapping[str, int], depth: int, chunk_tokens: int
) -> Scheduler:
    limits = Limits(
        context=placement.workload.context,
        sessions=placement.workload.sessions,
        vocabulary=structure.vocabulary,
        chunk_tokens=chunk_tokens,
        block_tokens=placement.workload.block_tokens,
        depth=depth,
    )
    paged = [group for group in structure.groups if group.kind != "state"]
    return Scheduler(tuple(GroupSpec(group.name, group.window, blocks[group.name]) for group in paged), limits)


def _require_possible(spec: StageSpec) -> None:
    """Refuse what this machine or this version cannot do. Raises InvalidPlacement."""
    node, _, device = spec.device.rpartition("/")
    kind, _, number = device.partition(":")
    counts = {
        "cpu": 1 << 16,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "xpu": torch.xpu.device_count() if torch.xpu.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }
    if node and not LOCAL_NODE.fullmatch(node):
        raise InvalidPlacement(
            f"{stage_name(spec)}: this version knows no node {node}; process/{device}, process-2/{device}, … are "
            "processes on this machine"
        )
    if int(number or 0) >= counts[kind]:
        raise InvalidPlacement(
            f"{stage_name(spec)}: there is no such device here; `splitrun doctor` lists those there are"
        )
    unused = {
        "kv.host_blocks": spec.kv.host_blocks,
        "kv.disk_blocks": spec.kv.disk_blocks,
        "stream_buffer": spec.stream_buffer_bytes,
    }
    for key, value in unused.items():
        if value:
            raise InvalidPlacement(f"{stage_name(spec)}: {key} {value} is not supported by this version: set it to 0")
