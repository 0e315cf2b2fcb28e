"""A node with a file system of its own: it cannot see the model, receives what its stages read, and keeps it."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cut_models import TinyModel, tiny_model
from node_clusters import TestCluster, cluster, shown
from test_nodes import answers
from test_processes import plan

from splitrun.cluster import node
from splitrun.cluster.model_here import Provider
from splitrun.cluster.model_there import RECEIVED
from splitrun.errors import StageLost
from splitrun.model.files import resolve
from splitrun.planner.facts import Workload

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0
    or shutil.which("unshare") is None
    or subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode != 0,
    reason="no namespaces can be made here",
)


HERE = ("model.embed_tokens", "model.layers.0.")
"""Tensors of the stage that is not on the node."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, model: TinyModel) -> Iterator[TestCluster]:
    """The second node runs where an empty file system lies over the model, with a home and a cache of its own."""
    with cluster(tmp_path_factory.mktemp("nodes"), "one") as made:
        home, head = made.add("far"), node.running(made.homes["one"])
        assert head is not None
        environment = {
            **os.environ,
            "HOME": str(made.folder / "far home"),
            "SPLITRUN_HOME": str(home.folder),
            "SPLITRUN_CACHE": str(cache_of(made)),
            "SPLITRUN_TOKEN": made.homes["one"].token(),
        }
        join = [sys.executable, "-m", "splitrun", "node", "join", head.head, "--port", str(made.ports["far"]),
                "--name", "far"]  # fmt: skip
        hidden = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(model.path.parent)]
        subprocess.run([*hidden, *join], env=environment, check=True, capture_output=True, timeout=120)
        yield made


def test_a_token_from_the_environment_goes_no_further(nodes: TestCluster) -> None:
    """It was there when the node joined. Its home keeps it, and neither its processes nor their logs show it."""
    token, home = nodes.homes["one"].token(), nodes.homes["far"]
    assert home.token() == token
    seen = shown(nodes.processes("far"))
    assert "raylet" in seen
    assert token not in seen
    assert token not in home.log_file.read_text()


def cache_of(nodes: TestCluster) -> Path:
    return nodes.folder / "far cache"


def test_what_a_node_lacks_is_sent_and_a_cut_costs_one_piece(
    nodes: TestCluster, model: TinyModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The stage dies behind its fifth tensor. The next start goes on there."""
    caplog.set_level(logging.WARNING)
    units = {"cpu": 2, "far/cpu": model.layers + 2}
    placement = plan(str(model.path), model.layers, units, Workload(64, sessions=3, block_tokens=4))
    sent: list[tuple[str, int, int]] = []
    send = Provider._send

    def counted(self: Provider, process: Any, folder: str, name: str, start: int, stop: int) -> None:
        if len(sent) == 5:
            for stage in nodes.stages("far"):
                stage.kill()
                stage.wait()
        sent.append((name, start, stop))
        send(self, process, folder, name, start, stop)

    monkeypatch.setattr(Provider, "_send", counted)
    with pytest.raises(StageLost, match="far/cpu was ended by signal 9"):
        answers(placement, model)
    (folder,) = (cache_of(nodes) / "received").iterdir()
    noted = (folder / RECEIVED).read_text().splitlines()
    assert noted == [" ".join(map(str, piece)) for piece in sent[:5]]
    assert answers(placement, model) == list(model.answers)
    again = [piece for piece in set(sent) if sent.count(piece) > 1]
    assert again == [sent[5]]
    needed = [name for name in resolve(str(model.path)).source.names() if not name.startswith(HERE)]
    assert len(set(sent)) == len(needed)
    assert any("far/cpu" in line and "of weights sent" in line for line in caplog.messages)
