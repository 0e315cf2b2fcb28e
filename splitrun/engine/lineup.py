"""Brings up the stages of a placement, here and elsewhere, and joins them to a pipeline; again for each new plan.

Knows the model's files and how to start processes and nodes, nothing of requests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import yaml

from splitrun.cluster.keeper import ORPHAN_S
from splitrun.cluster.model_here import Provider
from splitrun.cluster.nodes import Nodes
from splitrun.cluster.ports import data_ports
from splitrun.cluster.process import LOCAL_NODE, StageHandle, StageProcess, machine_of
from splitrun.engine.exchange import COORDINATOR
from splitrun.engine.interface import StageStatus
from splitrun.engine.loading import (
    Load,
    Ring,
    StageLoading,
    cpu_workers,
    load_stages,
    make_journals,
    make_links,
    pool_sizes,
    stage_name,
    worker_threads,
)
from splitrun.engine.pipeline import Outcome, Pipeline
from splitrun.engine.record import JSON_LOG_VARIABLE
from splitrun.engine.remote import LOOPBACK, Listening, Patience, RemoteStages
from splitrun.engine.room import journals_fit, kept_room, require_room
from splitrun.errors import ClusterError, InvalidPlacement
from splitrun.model.files import ModelFiles
from splitrun.model.structure import ModelStructure
from splitrun.planner.placement import Placement
from splitrun.planner.placement_file import dump
from splitrun.stage.batch import Traits

Replace = Callable[[str, Collection[str]], None]


@dataclass(frozen=True)
class Line:
    """Stages that are loaded and wait for a pipeline, and how the status shows them and their plan."""

    make_pipeline: Callable[[Callable[[Outcome], None]], Pipeline]
    stages: tuple[StageStatus, ...]
    placement: Mapping[str, Any]
    close: Callable[[], None]


@dataclass(frozen=True)
class LineUp:
    """What every bring-up has in common. ``depth`` is the number of steps in flight."""

    files: ModelFiles
    structure: ModelStructure
    traits: Traits
    load: Load
    depth: int
    chunk_tokens: int
    patience: Patience
    trace: bool = False

    def bring_up(self, placement: Placement, replace_lost: Replace | None = None) -> Line:
        """Load the placement's stages wherever they belong. Nothing stays behind when one of them fails.

        ``replace_lost``: see `RemoteStages`. Raises InvalidPlacement, ModelError, DeviceOutOfMemory or StageLost.
        """
        blocks = pool_sizes(placement, self.structure)
        require_room(placement, self.structure, blocks)
        threads = {name: worker_threads(placement, name) for name in placement.device_names if "/" not in name}
        loading = StageLoading(placement, self.files, self.structure, blocks, self.load, self.traits)
        journaled = journals_fit(placement, self.structure, blocks)
        kept = kept_room(placement, self.structure, blocks, journaled)
        remote = self._remote_stages(placement, kept, journaled, replace_lost)
        with ExitStack() as undo:
            if remote is not None:
                remote.start()
                undo.callback(remote.close)
            loaded = load_stages(loading, placement, threads)
            undo.callback(loaded.close)
            ring = Ring.of(placement, self.structure.hidden, self.depth, self.chunk_tokens)
            links = make_links(placement, loaded, remote.send if remote is not None else None, ring)
            memory = {index: loaded.memory_bytes(index) for index in loaded.stages}
            memory |= remote.memory_bytes if remote is not None else {}
            close = undo.pop_all().close

        def make_pipeline(deliver: Callable[[Outcome], None]) -> Pipeline:
            if remote is None:
                return Pipeline(links, deliver)
            peers = stage_peers(placement)
            journals = make_journals(placement, peers, loaded.stages) if journaled else {}
            pipeline = Pipeline(links, remote.outcome, remote, journals=journals)
            remote.run(pipeline, deliver)
            return pipeline

        statuses = tuple(
            StageStatus(spec.device, spec.units_text, memory[index], node=machine_of(spec.device))
            for index, spec in enumerate(placement.stages)
        )
        return Line(make_pipeline, statuses, yaml.safe_load(dump(placement)), close)

    def _remote_stages(
        self, placement: Placement, kept: Mapping[int, int], journals: bool, replace_lost: Replace | None
    ) -> RemoteStages | None:
        """The stages that are not in this process, not started; None when there are none. ``kept`` and ``journals``:
        see there."""
        devices = [name for name in placement.device_names if "/" in name]
        if not devices:
            return None
        nodes = Nodes() if any(machine_of(name) for name in devices) else None
        here = LOOPBACK if nodes is None else Listening(nodes.own.host, data_ports(nodes.own.port))
        text = dump(replace(placement, estimate=None))
        jobs = {}
        for device in devices:
            where, extra = here, dict[str, Any]()
            if nodes is not None and machine_of(device):
                node = nodes.node(machine_of(device))
                where = Listening(node.host, data_ports(node.port))
                extra = {"orphan_s": ORPHAN_S, "model": Provider(self.files).job()}
            jobs[device] = {
                "placement": text,
                "load": self.load,
                "depth": self.depth,
                "chunk_tokens": self.chunk_tokens,
                "trace": self.trace,
                "log": os.environ.get(JSON_LOG_VARIABLE, ""),
                "traits": asdict(self.traits),
                "threads": worker_threads(placement, device),
                "sharing": cpu_workers(placement, device),
                "host": where.host,
                "ports": where.ports,
                "shipped": [index for index, most in kept.items() if most and placement.stages[index].device == device],
                "journals": journals,
                **extra,
            }
        peers = stage_peers(placement)
        far = any(machine_of(name) for name in devices)
        starter = _Starter(nodes, self.files)
        return RemoteStages(peers, jobs, starter, self.patience, here, replace_lost if far else None, kept, journals)


def stage_peers(placement: Placement) -> tuple[str, ...]:
    """Who runs each stage: the device's name, or COORDINATOR for one that is in this process."""
    return tuple(spec.device if "/" in spec.device else COORDINATOR for spec in placement.stages)


@dataclass(frozen=True)
class _Starter:
    """Starts a stage process where its device is."""

    nodes: Nodes | None
    files: ModelFiles

    def __call__(self, device: str, job: Mapping[str, Any]) -> StageHandle:
        if self.nodes is None or LOCAL_NODE.fullmatch(device.rpartition("/")[0]):
            return StageProcess(device, job)
        return self.nodes.start(device, job, provider=Provider(self.files))


def require_nodes(placement: Placement) -> None:
    """Raise InvalidPlacement when the placement names a node that is not there."""
    far = [spec for spec in placement.stages if machine_of(spec.device)]
    if not far:
        return
    try:
        nodes = Nodes()
        for spec in far:
            nodes.node(machine_of(spec.device))
    except ClusterError as error:
        raise InvalidPlacement(f"{stage_name(far[0])}: {error}") from error
