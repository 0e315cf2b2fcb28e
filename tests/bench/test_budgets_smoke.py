"""The memory proof in short: one budget that holds a plan, one that does not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from splitrun.api import gather_facts
from splitrun.measure import timing

sys.path.insert(0, str(Path(__file__).parent))

MIB = 1 << 20


@pytest.mark.long
def test_plans_keep_their_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from budgets import SMALL, Case, judge

    monkeypatch.setattr(timing, "POINT_SECONDS", 0.0)
    shape = SMALL | {"num_hidden_layers": 6}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    facts = gather_facts(str(tmp_path), {"cpu": "2GiB"}, "nf4", None, "dummy", (1,))
    (cpu,) = facts.cluster.devices
    size = sum(unit.weight_bytes["nf4"] for unit in facts.profile.units)
    ran = judge(facts, Case(0, {"cpu": cpu.context_bytes + size + 160 * MIB}, 1024, 1, "nf4"))
    assert (ran.fault, ran.shortfall) == ("", None)
    assert ran.peak is not None
    assert ran.peak["cpu"] > size
    refused = judge(facts, Case(1, {"cpu": cpu.context_bytes + size // 2}, 1024, 1, "nf4"))
    assert refused.fault == ""
    assert refused.shortfall is not None
    assert refused.shortfall["cpu"] > size // 2
