"""What becomes of stages whose node is lost for good: this machine computes them, or there is a new plan over what
remains, with the same formats.

Knows when to plan again and that requests wait meanwhile; how stages are brought up is in ``lineup``.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection

from splitrun.cluster.facts import remaining_facts
from splitrun.cluster.links import troubles
from splitrun.cluster.nodes import Nodes
from splitrun.cluster.process import machine_of
from splitrun.engine.core import EngineCore
from splitrun.engine.lineup import Line, LineUp
from splitrun.engine.remaining import placement_here, plan_without
from splitrun.errors import ClusterError, SplitrunError, StageLost
from splitrun.planner.facts_file import Facts
from splitrun.planner.placement import Placement, StageSpec

RETURN_S = 2.0
"""How often to look whether a lost node is back."""
MOST_RETURN_S = 60.0
"""How often at least, where it was back and did not do: each time after twice as long."""
_LOG = logging.getLogger(__name__)


class Succession:
    """Replaces the stages of an engine core. ``rebalance``: move back when lost nodes are back."""

    def __init__(self, lineup: LineUp, placement: Placement, rebalance: bool) -> None:
        self._core: EngineCore | None = None
        self._line: Line | None = None
        self._attached = threading.Event()
        self._turn = threading.Lock()
        self._lineup = lineup
        self._first = placement
        self._placement = placement
        self._rebalance = rebalance
        self._lost: set[str] = set()
        self._waiting: threading.Thread | None = None

    def attach(self, core: EngineCore, line: Line) -> None:
        """The core whose stages these are, and the stages."""
        self._core, self._line = core, line
        self._attached.set()

    def take_over(self, devices: Collection[str]) -> bool:
        """See `Successor`. What the others have computed stays. Not while stages move back."""
        if self._core is None or self._line is None or not self._turn.acquire(blocking=False):
            return False
        try:
            lost = self._lost | {machine_of(device) or device for device in devices}
            stages = [index for index, spec in enumerate(self._placement.stages) if spec.device in devices]
            kept = sum(stage.kept_bytes for stage in self._core.status().stages)
            placement = placement_here(self._placement, self._facts(lost), lost, stages, kept)
            if placement is None or self._line.take_over is None:
                return False
            self._core.show(self._line.take_over(placement, stages))
            self._lost = lost
            self._tell(placement, self._line)
            self._look_out()
        except SplitrunError as error:
            _LOG.warning("stages of %s cannot be computed here beside the others: %s", ", ".join(devices), error)
            return False
        finally:
            self._turn.release()
        return True

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
        self._look_out()

    def _look_out(self) -> None:
        """Wait for lost nodes from now on, if they are to be used again."""
        if self._rebalance and self._waiting is None:
            self._waiting = threading.Thread(target=self._await_return, name="splitrun return", daemon=True)
            self._waiting.start()

    def _without_lost(self) -> Line:
        """The stages of a new plan. One more node may be lost while they load, and then the next plan does without."""
        for _ in range(len(self._first.device_names)):
            placement = plan_without(self._first, self._facts(self._lost), self._lost)
            try:
                line = self._lineup.bring_up(placement, self)
            except StageLost:
                gone = {machine_of(name) for name in placement.device_names} - {""} - living()
                if not gone:
                    raise
                self._lost |= gone
                continue
            self._tell(placement, line)
            return line
        raise StageLost("one node after the other was lost")

    def _facts(self, lost: Collection[str]) -> Facts:
        return remaining_facts(self._lineup.files, self._lineup.structure, self._first, lost)

    def _tell(self, placement: Placement, line: Line) -> None:
        """Say which grade of equality holds with these stages."""
        kinds = [{_kind(spec) for spec in plan.stages} for plan in (self._placement, placement)]
        same = kinds[0] == kinds[1] or all(spec.weights == "fp32" for spec in placement.stages)
        grade = "the very tokens" if same else "unbroken, but rounded as the new kind of device does"
        where = "; ".join(f"{spec.units_text} on {spec.device}" for spec in placement.stages)
        _LOG.warning("planned again: %s; streams go on: %s", where, grade)
        self._placement, self._line = placement, line

    def _await_return(self) -> None:
        """Move back when every lost node is back, and one of its processes can be started and reached."""
        assert self._core is not None
        wait_s = RETURN_S
        while not self._core.closed.wait(wait_s):
            if not self._lost or not self._lost <= living():
                wait_s = RETURN_S
                continue
            if not self._troubled():
                with self._turn:
                    back = ", ".join(sorted(self._lost))
                    self._core.replace(f"{back} is back: stages are moving there", self._as_first)
            wait_s = min(2 * wait_s, MOST_RETURN_S) if self._lost else RETURN_S

    def _troubled(self) -> bool:
        """Whether a lost node is there, but not of use: found out before anything is closed here."""
        try:
            faults = troubles(Nodes(), self._lost)
        except ClusterError as error:
            faults = {"the head": str(error)}
        for name, fault in faults.items():
            _LOG.warning("%s is back, but cannot be used yet: %s", name, fault)
        return bool(faults)

    def _as_first(self) -> Line:
        lost, self._lost = self._lost, set()
        try:
            line = self._lineup.bring_up(self._first, self)
        except SplitrunError as error:
            _LOG.warning("the node that came back does not do: %s", error)
            self._lost = lost
            return self._without_lost()
        self._tell(self._first, line)
        return line


def living() -> set[str]:
    """The nodes that are there; none when the head does not answer."""
    try:
        return {node.name for node in Nodes().all() if node.alive}
    except ClusterError:
        return set()


def _kind(spec: StageSpec) -> tuple[str, str]:
    return spec.device.rpartition("/")[2].partition(":")[0], spec.weights
