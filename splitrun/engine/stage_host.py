"""The stages of one device in a process of their own: load them, run what arrives, send it on.

Knows its job (a placement and which device of it), nothing of the pipes to its parent.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from splitrun.cluster.lines import Parent
from splitrun.cluster.model_there import locate
from splitrun.engine.exchange import COORDINATOR, Exchange, Route
from splitrun.engine.loading import (
    LoadedStages,
    Ring,
    StageLoading,
    host_threads,
    load_stages,
    make_journals,
    make_links,
    pool_sizes,
)
from splitrun.engine.outcome import Failure, Outcome
from splitrun.engine.pipeline import Pipeline
from splitrun.engine.shipping import Shipping
from splitrun.model.files import resolve
from splitrun.model.structure import inspect
from splitrun.planner.placement import Placement
from splitrun.schedule.flat import MalformedMessage
from splitrun.schedule.step import Step, Tokens
from splitrun.stage.batch import Traits
from splitrun.stage.generic import RangeStage
from splitrun.transport.frames import Frame, Kind
from splitrun.transport.mailbox import Address
from splitrun.transport.messages import kv_of, tokens_frame
from splitrun.transport.socket import SocketMailbox

SPANS_A_FRAME = 1000


class StageHost:
    """Runs the stages of ``job["device"]``. Listens from the start; raises ClusterError when it cannot."""

    def __init__(self, job: Mapping[str, Any], parent: Parent) -> None:
        self._job = job
        self._parent = parent
        self._device = str(job["device"])
        self._exchange = Exchange(Route(int(job["session"]), tuple(job["peers"])), self._device)
        self._own = [index for index, peer in enumerate(job["peers"]) if peer == self._device]
        first, last = job["ports"]
        self._mailbox = SocketMailbox(int(job["session"]), self._receive, str(job["host"]), (int(first), int(last)))
        self._pipeline: Pipeline | None = None
        self._shipping: Shipping | None = None
        self._stages: Mapping[int, RangeStage] = {}

    @property
    def address(self) -> tuple[str, str]:
        """Where frames are received, and the public key."""
        return self._mailbox.address.endpoint, self._mailbox.address.public_key

    def load(self) -> dict[int, int]:
        """Load the stages; stage index -> bytes of weights and KV. Raises ModelError or DeviceOutOfMemory."""
        placement, job = _placement_of(self._job["placement"], self._device), self._job
        if "model" in job:
            files = locate(job["model"], self._parent, self._device)
        else:
            files = resolve(placement.model.source, placement.model.revision, weights=job["load"] == "weights")
        structure = inspect(files.config)
        blocks = pool_sizes(placement, structure)
        loading = StageLoading(placement, files, structure, blocks, job["load"], Traits(**job["traits"]))
        device = self._device.rpartition("/")[2]
        foreign = {index for index in range(len(placement.stages)) if index not in self._own}
        threads = job["threads"] or host_threads(device, int(job["sharing"]))
        loaded = load_stages(loading, placement, {device: threads}, foreign, int(job["sharing"]))
        ring = Ring.of(placement, structure.hidden, int(job["depth"]), int(job["chunk_tokens"]))
        self._start(placement, loaded, ring)
        return {index: loaded.memory_bytes(index) for index in self._own}

    def connect(self, peers: Mapping[str, tuple[str, str]]) -> None:
        """Learn where the others are."""
        for peer, (endpoint, key) in peers.items():
            if peer != self._device:
                self._mailbox.connect(peer, Address(endpoint, key))

    def beat(self) -> None:
        """Tell the coordinator that this process lives, and how its stages do."""
        pipeline = self._pipeline
        assert pipeline is not None, "the stages are loaded before they are connected"
        clocks = {index: pipeline.clocks[index] for index in self._own}
        figures = {
            index: [clock.last_s, clock.total_s, clock.steps, clock.queued, clock.sent_bytes]
            for index, clock in clocks.items()
        }
        control = {"clocks": figures, "busy": pipeline.busy}
        self._send(Frame(Kind.BEAT, self._exchange.route.session, self._own[0], control=control))
        spans = pipeline.record.take() if self._job.get("trace") else []
        for start in range(0, len(spans), SPANS_A_FRAME):
            listed = [span.to_list() for span in spans[start : start + SPANS_A_FRAME]]
            control = {"now": time.monotonic(), "spans": listed}
            self._send(Frame(Kind.SPANS, self._exchange.route.session, self._own[0], control=control))

    def _start(self, placement: Placement, loaded: LoadedStages, ring: Ring) -> None:
        links = make_links(placement, loaded, self._send_step, ring)
        shipped = {index: loaded.stages[index] for index in self._job["shipped"]}
        self._stages = loaded.stages
        self._shipping = Shipping(self._exchange.route.session, shipped, self._send)
        journals = make_journals(placement, self._exchange.route.peers, loaded.stages) if self._job["journals"] else {}
        self._pipeline = Pipeline(links, self._deliver, after=self._shipping.after, journals=journals)
        self._exchange.pipeline = self._pipeline

    def _send(self, frame: Frame) -> bool:
        return self._mailbox.send(COORDINATOR, frame)

    def _send_step(self, stage: int, step: Step, activation: Tensor | None) -> None:
        self._exchange.send_step(self._mailbox, stage, step, activation)

    def _deliver(self, outcome: Outcome) -> None:
        """Send what came of a step to the coordinator."""
        session, stage = self._exchange.route.session, self._own[-1]
        if isinstance(outcome, Tokens):
            self._send(tokens_frame(session, stage, outcome))
        elif isinstance(outcome, Failure):
            self._fail(outcome.epoch, outcome.step, type(outcome.error).__name__, str(outcome.error))

    def _fail(self, epoch: int, step: int, kind: str, message: str, *, lost: bool = False) -> None:
        control = {"kind": kind, "message": message[:2000], "lost": lost}
        self._send(Frame(Kind.FAILURE, self._exchange.route.session, self._own[0], epoch, 0, step, control))

    def _restore(self, frame: Frame) -> None:
        """Put KV in its place, and say so. What cannot be done is told as a loss. Raises MalformedMessage for what is
        not the stage's KV."""
        pipeline, shipping, kv = self._pipeline, self._shipping, kv_of(frame)
        if pipeline is None or shipping is None or frame.stage not in self._stages:
            raise MalformedMessage(f"stage {frame.stage} is not here")
        stage = self._stages[frame.stage]
        try:
            stage.check_restorable(kv.tables, kv.start, kv.rows)
        except ValueError as error:
            raise MalformedMessage(str(error)) from error

        def place() -> None:
            stage.restore(kv.tables, kv.start, kv.rows)
            shipping.restored(frame.stage, kv.slot, kv.request, kv.start + kv.rows.shape[0])
            self._send(Frame(Kind.RESTORED, frame.session, frame.stage, step=frame.step))

        def failed(error: Exception) -> None:
            self._fail(0, 0, "StageLost", f"its KV could not be restored: {error}", lost=True)

        pipeline.work(frame.stage, place, failed)

    def _receive(self, frame: Frame) -> None:
        if frame.kind is Kind.KV:
            self._restore(frame)
            return
        if frame.kind is not Kind.STEP:
            raise MalformedMessage(f"{frame.kind.name} is not for a stage")
        verdict = self._exchange.take_step(frame)
        if verdict != "run":
            self._mailbox.dropped.add(verdict)
        if verdict == "gap":
            self._fail(frame.epoch, frame.step, "StageLost", "a step before was lost on its way", lost=True)


def _placement_of(text: str, device: str) -> Placement:
    """The placement as this process sees it: its own device without the node's name, and no slabs."""
    with tempfile.TemporaryDirectory(prefix="splitrun-") as directory:
        file = Path(directory) / "placement.yaml"
        file.write_text(text, encoding="utf-8")
        placement = Placement.load(file)
    here = partial(_without_node, device)
    stages = tuple(replace(spec, device=here(spec.device), stream_buffer_bytes=0) for spec in placement.stages)
    budgets = {name.rpartition("/")[2]: budget for name, budget in placement.devices.items() if name == device}
    return replace(placement, stages=stages, devices=budgets)


def _without_node(own: str, name: str) -> str:
    return name.rpartition("/")[2] if name == own else name
