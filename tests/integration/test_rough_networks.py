"""Stages behind a line that is slow, loses packets, or is cut: no false alarm, no lost token."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import networks
import psutil
import pytest
from node_clusters import TestCluster, cluster_over
from test_processes import PROMPTS, demo, remote_of, restarts

import splitrun

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not networks.possible(), reason="making network namespaces needs root"),
]
SAMPLING = splitrun.SamplingParams(max_tokens=8, temperature=1.2, seed=5, ignore_eos=True)


@pytest.fixture(scope="module", params=[0.2, 0.4], ids=["200 ms there and back", "200 ms each way"])
def line(request: pytest.FixtureRequest) -> Iterator[networks.Line]:
    with networks.rough(round_trip_s=request.param, loss=0.02) as made:
        yield made


@pytest.fixture(scope="module")
def nodes(line: networks.Line, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    with cluster_over(line, tmp_path_factory.mktemp("rough")) as made:
        yield made


def answers(engine: splitrun.Engine) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in engine.generate(PROMPTS, SAMPLING)]


def test_delay_loss_and_a_cut_line(nodes: TestCluster, line: networks.Line) -> None:
    with splitrun.Engine(demo("cpu"), chunk_tokens=64) as engine:
        expected = answers(engine)
    with splitrun.Engine(demo("cpu", "far/cpu"), chunk_tokens=64) as engine:
        assert answers(engine) == expected
        assert restarts(engine) == 0
        assert engine.core.status().epoch == 0
        (stage,) = nodes.stages("far")
        remote, outcome = remote_of(engine), list[Any]()
        send, seen = remote._mailbox.send, [0]

        def counted(peer: str, frame: Any) -> None:
            seen[0] += 1
            if seen[0] == 4:
                line.set("down")
            send(peer, frame)

        remote._mailbox.send = counted  # type: ignore[method-assign]
        began = time.monotonic()
        worker = threading.Thread(target=lambda: outcome.extend(answers(engine)))
        worker.start()
        psutil.wait_procs([stage], timeout=12)
        assert not stage.is_running(), "the stage beyond the cut does not end itself"
        worker.join(30)
        assert outcome == expected
        assert time.monotonic() - began < 30
        assert [stage.device for stage in engine.core.status().stages] == ["cpu", "cpu"]
    line.set("up")
