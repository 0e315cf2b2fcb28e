"""Brings up the stages of a placement, here and elsewhere, and joins them to a pipeline; again for each new plan.

Knows the model's files and how to start processes and nodes, nothing of requests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import yaml

from splitrun.cluster.keeper import ORPHAN_S
from splitrun.cluster.model_here import Provider
from splitrun.cluster.nodes import Nodes
from splitrun.cluster.ports import data_ports
from splitrun.cluster.process import LOCAL_NODE, StageHandle, StageProcess, machine_of
from splitrun.engine.exchange import COORDINATOR
from splitrun.engine.interface import StageStatus
from splitrun.engine.link import Link, RemoteLink
from splitrun.engine.loading import (
    Load,
    LoadedStages,
    Ring,
    StageLoading,
    cpu_workers,
    load_more,
    load_stages,
    make_journals,
    make_links,
    pool_sizes,
    stage_name,
    worker_threads,
)
from splitrun.engine.outcome import Outcome
from splitrun.engine.patience import LOOPBACK, Listening, Patience, Successor
from splitrun.engine.pipeline import Pipeline
from splitrun.engine.record import JSON_LOG_VARIABLE
from splitrun.engine.remote import RemoteStages
from splitrun.engine.room import journals_fit, kept_room, require_room
from splitrun.errors import ClusterError, InvalidPlacement
from splitrun.model.files import ModelFiles
from splitrun.model.structure import ModelStructure
from splitrun.planner.placement import Placement
from splitrun.planner.placement_file import dump
from splitrun.stage.batch import Traits
from splitrun.transport.journal import Journal


@dataclass(frozen=True)
class Line:
    """Stages that are loaded and wait for a pipeline, and how the status shows them and their plan.

    ``take_over``: load these stages here, where a placement has them now, and let the pipeline that runs go on with
    them; gives the new line, or raises as `LineUp.bring_up`. Nothing may run meanwhile.
    """

    make_pipeline: Callable[[Callable[[Outcome], None]], Pipeline]
    stages: tuple[StageStatus, ...]
    placement: Mapping[str, Any]
    close: Callable[[], None]
    take_over: Callable[[Placement, Collection[int]], Line] | None = None


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

    def bring_up(self, placement: Placement, successor: Successor | None = None) -> Line:
        """Load the placement's stages wherever they belong. Nothing stays behind when one of them fails.

        ``successor``: see `RemoteStages`. Raises InvalidPlacement, ModelError, DeviceOutOfMemory or StageLost.
        """
        blocks = pool_sizes(placement, self.structure)
        require_room(placement, self.structure, blocks)
        threads = {name: worker_threads(placement, name) for name in placement.device_names if "/" not in name}
        loading = StageLoading(placement, self.files, self.structure, blocks, self.load, self.traits)
        journaled = journals_fit(placement, self.structure, blocks)
        kept = kept_room(placement, self.structure, blocks, journaled)
        remote = self._remote_stages(placement, kept, journaled, successor)
        with ExitStack() as undo:
            if remote is not None:
                remote.start()
                undo.callback(remote.close)
            loaded = load_stages(loading, placement, threads)
            undo.callback(loaded.close)
            ring = Ring.of(placement, self.structure.hidden, self.depth, self.chunk_tokens)
            joined = _Joined(loading, loaded, ring, remote, journaled)
            links = joined.links(placement)
            return joined.line(placement, links, undo.pop_all().close)

    def _remote_stages(
        self, placement: Placement, kept: Mapping[int, int], journals: bool, successor: Successor | None
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
        return RemoteStages(peers, jobs, starter, self.patience, here, successor if far else None, kept, journals)


class _Joined:
    """Stages in their places, here and elsewhere (``remote``), as the placements of one after the other have them.

    ``journaled``: what is sent to processes elsewhere is kept.
    """

    def __init__(
        self, loading: StageLoading, loaded: LoadedStages, ring: Ring, remote: RemoteStages | None, journaled: bool
    ) -> None:
        self._loading = loading
        self._loaded = loaded
        self._ring = ring
        self._remote = remote
        self._journaled = journaled
        self._pipeline: Pipeline | None = None

    def links(self, placement: Placement) -> list[Link | RemoteLink]:
        """The pipeline's links."""
        return make_links(placement, self._loaded, self._remote.send if self._remote else None, self._ring)

    def line(self, placement: Placement, links: Sequence[Link | RemoteLink], close: Callable[[], None]) -> Line:
        """How it looks with these links; ``close`` undoes everything, for a line that never runs."""
        memory = self._remote.memory_bytes if self._remote else {}
        memory = memory | {index: self._loaded.memory_bytes(index) for index in self._loaded.stages}
        statuses = tuple(
            StageStatus(spec.device, spec.units_text, memory[index], node=machine_of(spec.device))
            for index, spec in enumerate(placement.stages)
        )
        run, take_over = partial(self._run, placement, links), partial(self._take_over, close)
        return Line(run, statuses, yaml.safe_load(dump(placement)), close, take_over)

    def _run(
        self, placement: Placement, links: Sequence[Link | RemoteLink], deliver: Callable[[Outcome], None]
    ) -> Pipeline:
        if self._remote is None:
            self._pipeline = Pipeline(links, deliver)
            return self._pipeline
        self._pipeline = Pipeline(links, self._remote.outcome, self._remote, journals=self._journals(placement))
        self._remote.run(self._pipeline, deliver)
        return self._pipeline

    def _take_over(self, close: Callable[[], None], placement: Placement, stages: Collection[int]) -> Line:
        assert self._pipeline is not None, "stages are lost while they run"
        self._loaded = load_more(self._loading, placement, self._loaded, stages)
        links = self.links(placement)
        self._pipeline.relink(links, self._journals(placement))
        return self.line(placement, links, close)

    def _journals(self, placement: Placement) -> dict[int, Journal]:
        """A journal for each stage elsewhere behind one that is here, if what is sent is kept."""
        return make_journals(placement, stage_peers(placement), self._loaded.stages) if self._journaled else {}


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
