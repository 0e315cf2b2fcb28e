"""What the engine takes beside its stages: measured once, and where it goes in a cluster."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from planner_models import device

from splitrun.engine import own_seconds, process_bytes
from splitrun.engine.own_seconds import engine_cost
from splitrun.measure.cache import Cache
from splitrun.measure.gather import EngineCost, with_engine
from splitrun.planner.facts import Cluster, Link


def test_it_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_seconds, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(own_seconds, "process_bytes", lambda card: 400 << 20)
    found = engine_cost(Cache(tmp_path))
    assert 0 <= found.step_s < 0.5
    assert 0 <= found.hop_s < 0.5
    assert found.process_bytes == 400 << 20
    monkeypatch.setattr(own_seconds, "process_bytes", lambda card: pytest.fail("measured twice"))
    assert engine_cost(Cache(tmp_path)) == found


def test_where_it_goes() -> None:
    links = {("cpu", "cuda:0"): Link(1e-3, 1e9)}
    cluster = with_engine(
        Cluster((device(), device("cpu:1"), device("cuda:0")), links), EngineCost(2e-4, 1e-4, 500 << 20)
    )
    assert cluster.step_s == 2e-4
    assert cluster.link("cpu", "cuda:0").latency_s == pytest.approx(1.1e-3)
    assert cluster.link("cpu", "cpu:1").latency_s == 1e-4
    assert [each.context_bytes for each in cluster.devices][:2] == [500 << 20, 0]


def test_a_process_of_its_own_says_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 100 << 20 < process_bytes.process_bytes(None) < 4 << 30
    monkeypatch.setattr(process_bytes, "child_command", lambda module: [os.devnull])
    assert process_bytes.process_bytes(None) == process_bytes.ASSUMED_BYTES
