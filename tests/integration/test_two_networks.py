"""A node in a network of its own, at the other end of a cable: the same ids, one range of ports, and a pulled plug."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import networks
import pytest
from node_clusters import TestCluster, cluster_over
from pauses import MOST_S, Pause
from test_processes import (
    GREEDY,
    LAYERS,
    PATIENCE,
    SAMPLED,
    WORKLOAD,
    at_step,
    cut_everywhere,
    demo,
    restarts,
    run,
    undisturbed,
)

import splitrun
from splitrun.cluster.ports import COUNT
from splitrun.engine import succession

pytestmark = pytest.mark.skipif(not networks.possible(), reason="making network namespaces needs root")


@pytest.fixture(scope="module")
def line() -> Iterator[networks.Line]:
    with networks.wire() as made:
        yield made


@pytest.fixture(scope="module")
def nodes(line: networks.Line, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    with cluster_over(line, tmp_path_factory.mktemp("networks")) as made:
        yield made


@pytest.fixture(scope="module")
def expected() -> dict[str, list[tuple[int, ...]]]:
    return undisturbed()


LISTENING = """
import json, psutil
found = [entry.laddr for entry in psutil.net_connections("tcp") if entry.status == psutil.CONN_LISTEN]
print(json.dumps([[address.ip, address.port] for address in found]))
"""


def test_every_cut_over_two_networks(nodes: TestCluster, line: networks.Line, expected: dict[str, Any]) -> None:
    """Each unit a stage, by turns on either side. All that listens there does so in the node's range; the stage for
    the address that the node joined with alone (Ray for every address of the machine, once it has another than the
    loopback)."""
    placement = cut_everywhere("demo", LAYERS, ("near/cpu", "far/cpu"), WORKLOAD)
    with splitrun.Engine(placement, chunk_tokens=16, patience=PATIENCE) as engine:
        assert run(engine) == expected["greedy"]
        assert run(engine, SAMPLED) == expected["sampled"]
        assert restarts(engine) == 0
        outcome = networks.output(*line.command(sys.executable, "-c", LISTENING))
    found = json.loads(outcome)
    base = nodes.ports["far"]
    assert all(base <= port < base + COUNT for address, port in found), found
    assert {address for address, port in found if port >= base + COUNT // 2} == {line.there}


def test_a_plug_that_is_pulled_and_put_back(
    nodes: TestCluster, line: networks.Line, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The streams go on here, and the stage moves back when the line is there again."""
    monkeypatch.setattr(succession, "RETURN_S", 0.3)
    placement = demo("cpu", "far/cpu")
    with splitrun.Engine(placement, chunk_tokens=16, patience=PATIENCE, rebalance=True) as engine:
        pause = Pause(engine, monkeypatch)
        at_step(engine, monkeypatch, 21, pause.of(lambda: line.set("down")))
        assert run(engine, SAMPLED) == expected["sampled"]
        assert pause.beyond_loading_s < MOST_S
        assert [stage.device for stage in engine.core.status().stages] == ["cpu", "cpu"]
        line.set("up")
        deadline = time.monotonic() + 60
        while [stage.device for stage in engine.core.status().stages] != ["cpu", "far/cpu"]:
            assert time.monotonic() < deadline, "the node can be reached again and is not used"
            assert run(engine) == expected["greedy"]
        assert run(engine, GREEDY) == expected["greedy"]
        assert engine.core.status().healthy
