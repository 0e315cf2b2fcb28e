"""What becomes of stages whose node is lost for good: a new plan over what remains, with the same formats.

Knows when to plan again and that requests wait meanwhile; how stages are brought up is in ``lineup``.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection
from dataclasses import replace

from splitrun.cluster.facts import remaining_facts
from splitrun.cluster.nodes import Nodes
from splitrun.cluster.process import machine_of
from splitrun.engine.core import EngineCore
from splitrun.engine.lineup import Line, LineUp
from splitrun.errors import ClusterError, InvalidPlacement, SplitrunError, StageLost
from splitrun.planner.facts_file import Facts
from splitrun.planner.placement import Placement, StageSpec, is_processor
from splitrun.planner.solve import solve

RETURN_S = 2.0
"""How often to look whether a lost node is back."""
_LOG = logging.getLogger(__name__)


class Succession:
    """Replaces the stages of an engine core. ``rebalance``: move back when lost nodes are back."""

    def __init__(self, lineup: LineUp, placement: Placement, rebalance: bool) -> None:
        self._core: EngineCore | None = None
        self._attached = threading.Event()
        self._turn = threading.Lock()
        self._lineup = lineup
        self._first = placement
        self._placement = placement
        self._rebalance = rebalance
        self._lost: set[str] = set()
        self._waiting: threading.Thread | None = None

    def attach(self, core: EngineCore) -> None:
        """The core whose stages these are."""
        self._core = core
        self._attached.set()

    def replace(self, reason: str, devices: Collection[str]) -> None:
        """Plan again without the machines of these devices, on a thread of its own."""
        self._lost |= {machine_of(device) or device for device in devices}
        threading.Thread(target=self._succeed, args=(reason,), name="splitrun succession", daemon=True).start()

    def _succeed(self, reason: str) -> None:
        self._attached.wait()
        assert self._core is not None
        with self._turn:
            without = ", ".join(sorted(self._lost))
            self._core.replace(f"lost: {reason}: planning again without {without}", self._without_lost)
        if self._rebalance and self._waiting is None:
            self._waiting = threading.Thread(target=self._await_return, name="splitrun return", daemon=True)
            self._waiting.start()

    def _without_lost(self) -> Line:
        """The stages of a new plan. One more node may be lost while they load, and then the next plan does without."""
        for _ in range(len(self._first.device_names)):
            placement = plan_without(self._first, self._facts(), self._lost)
            try:
                line = self._lineup.bring_up(placement, self.replace)
            except StageLost:
                gone = {machine_of(name) for name in placement.device_names} - {""} - living()
                if not gone:
                    raise
                self._lost |= gone
                continue
            self._tell(placement)
            return line
        raise StageLost("one node after the other was lost")

    def _facts(self) -> Facts:
        return remaining_facts(self._lineup.files, self._lineup.structure, self._first, self._lost)

    def _tell(self, placement: Placement) -> None:
        """Say which grade of equality holds now."""
        kinds = [{_kind(spec) for spec in plan.stages} for plan in (self._placement, placement)]
        same = kinds[0] == kinds[1] or all(spec.weights == "fp32" for spec in placement.stages)
        grade = "the very tokens" if same else "unbroken, but rounded as the new kind of device does"
        where = "; ".join(f"{spec.units_text} on {spec.device}" for spec in placement.stages)
        _LOG.warning("planned again: %s; streams go on: %s", where, grade)
        self._placement = placement

    def _await_return(self) -> None:
        """Move back when every lost node is back."""
        assert self._core is not None
        while not self._core.closed.wait(RETURN_S):
            if self._lost and self._lost <= living():
                with self._turn:
                    back = ", ".join(sorted(self._lost))
                    self._core.replace(f"{back} is back: stages are moving there", self._as_first)

    def _as_first(self) -> Line:
        lost, self._lost = self._lost, set()
        try:
            line = self._lineup.bring_up(self._first, self.replace)
        except SplitrunError as error:
            _LOG.warning("the node that came back does not do: %s", error)
            self._lost = lost
            return self._without_lost()
        self._tell(self._first)
        return line


def living() -> set[str]:
    """The nodes that are there; none when the head does not answer."""
    try:
        return {node.name for node in Nodes().all() if node.alive}
    except ClusterError:
        return set()


def _moved(spec: StageSpec, device: str) -> StageSpec:
    """The stage on another device, in a type that it can keep K and V in."""
    kept = spec.kv if spec.kv.dtype != "int8" or is_processor(device) else replace(spec.kv, dtype=None)
    return replace(spec, device=device, kv=kept)


def plan_without(placement: Placement, facts: Facts, lost: Collection[str]) -> Placement:
    """The same model, workload and formats on the devices of ``facts``. Raises DoesNotFit or InvalidPlacement."""
    formats = {(spec.weights, spec.kv.dtype) for spec in placement.stages}
    if len(formats) == 1:
        ((weights, kv_dtype),) = formats
        cluster = facts.cluster
        if kv_dtype == "int8" and any(device.kind == "cpu" for device in cluster.devices):
            cluster = cluster.keeping(kv_dtype)
        found = solve(facts.profile, cluster, placement.workload, weights, stream=True)
        wanted = None if kv_dtype == "int8" else kv_dtype
        stages = tuple(replace(spec, kv=replace(spec.kv, dtype=wanted or spec.kv.dtype)) for spec in found.stages)
        return replace(found, model=placement.model, stages=stages)
    taken = max(facts.cluster.devices, key=lambda device: device.budget_bytes, default=None)
    if taken is None:
        raise InvalidPlacement("no device remains")
    here = [
        _moved(spec, taken.name) if (machine_of(spec.device) or spec.device) in lost else spec
        for spec in placement.stages
    ]
    return replace(placement, stages=tuple(here), devices={}, estimate=None)


def _kind(spec: StageSpec) -> tuple[str, str]:
    return spec.device.rpartition("/")[2].partition(":")[0], spec.weights
