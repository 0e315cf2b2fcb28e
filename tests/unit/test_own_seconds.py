"""What the engine takes beside its stages: measured once, and where it goes in a cluster."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from planner_models import device

from splitrun.engine import own_seconds, process_bytes
from splitrun.engine.own_seconds import engine_cost
from splitrun.engine.process_bytes import ProcessBytes
from splitrun.measure import engine_cost as engine_cost_module
from splitrun.measure.cache import Cache
from splitrun.measure.engine_cost import EngineCost, cost_key, known_cost, with_engine
from splitrun.planner.facts import Cluster, Link


def test_it_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_seconds, "READ_BYTES", 1 << 16)
    taken = {None: ProcessBytes(400 << 20, 0), "cuda:0": ProcessBytes(900 << 20, 700 << 20, 150 << 20, 30 << 20)}
    monkeypatch.setattr(own_seconds, "process_bytes", taken.__getitem__)
    assert known_cost(Cache(tmp_path), "cuda:0") is None
    found = engine_cost(Cache(tmp_path), "cuda:0")
    assert 0 <= found.step_s < 0.5
    assert 0 <= found.hop_s < 0.5
    assert 0 <= found.warm_step_s <= found.step_s
    assert 0 <= found.request_s < 0.5
    assert 0 <= found.next_request_s < 0.5
    assert (found.process_bytes, found.card_process_bytes, found.card_context_bytes) == (
        400 << 20,
        500 << 20,
        700 << 20,
    )
    assert (found.card_layers_bytes, found.card_layers_context_bytes) == (150 << 20, 30 << 20)
    monkeypatch.setattr(own_seconds, "process_bytes", lambda card: pytest.fail("measured twice"))
    assert engine_cost(Cache(tmp_path), "cuda:0") == found == known_cost(Cache(tmp_path), "cuda:0")


def test_another_card_of_that_name_or_another_driver_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    keys = set()
    for name, size, driver in (("A", 1, "1"), ("B", 1, "1"), ("A", 2, "1"), ("A", 1, "2")):
        card = SimpleNamespace(name=name, total_memory=size)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index, card=card: card)
        monkeypatch.setattr(engine_cost_module, "versions", lambda kind, driver=driver: (f"driver {driver}",))
        keys.add(cost_key("cuda:0"))
    assert len(keys) == 4


def test_where_it_goes() -> None:
    links = {("cpu", "cuda:0"): Link(1e-3, 1e9)}
    cards = device("cuda:0"), device("cuda:1", context_bytes=100 << 20)
    integrated = device("xpu:0", kind="xpu", memory_pool="cpu", context_bytes=50 << 20)
    cluster = with_engine(
        Cluster((device(), device("cpu:1"), *cards, integrated), links),
        EngineCost(2e-4, 5e-5, 3e-4, 2e-4, 1e-4, 500 << 20, 400 << 20, 300 << 20, 150 << 20, 30 << 20),
    )
    assert (cluster.step_s, cluster.warm_step_s, cluster.request_s) == (2e-4, 5e-5, 3e-4)
    assert cluster.link("cpu", "cuda:0").latency_s == pytest.approx(1.1e-3)
    assert cluster.link("cpu", "cpu:1").latency_s == 1e-4
    # The first card was measured with its kernels loaded: so much more is taken of every card.
    assert [each.context_bytes >> 20 for each in cluster.devices] == [500, 0, 300, 144, 550]
    assert [each.process_bytes >> 20 for each in cluster.devices] == [0, 0, 0, 0, 500]  # shares the process's memory
    assert [each.layers_context_bytes >> 20 for each in cluster.devices] == [0, 0, 30, 30, 0]
    assert (cluster.card_process_bytes, cluster.card_layers_bytes) == (400 << 20, 150 << 20)


def test_a_process_of_its_own_says_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    found = process_bytes.process_bytes(None)
    assert (100 << 20 < found.host < 4 << 30, found.context) == (True, 0)
    monkeypatch.setattr(process_bytes, "child_command", lambda module: [os.devnull])
    assert process_bytes.process_bytes(None).host == process_bytes.ASSUMED_BYTES
    assert process_bytes.process_bytes("cuda:0").host == 2 * process_bytes.ASSUMED_BYTES
