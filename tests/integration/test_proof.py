"""The proof that a model can be cut: it accepts what is exact, refuses what is not, and can tell the difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from splitrun.errors import UnsupportedModel
from splitrun.model.cut import CutModel
from splitrun.model.skeleton import exact_context
from splitrun.stage import proof
from splitrun.stage.blocks import BlockStore, BlockView
from splitrun.stage.proof import prove


def test_states_that_cannot_continue_by_chunk_are_noticed(tmp_path: Path) -> None:
    assert prove(AutoConfig.for_model("mamba"), tmp_path).one_by_one
    assert not prove(AutoConfig.for_model("llama"), tmp_path).one_by_one


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("recurrent_gemma", r"recurrent_gemma cannot be cut exactly: its cut twin differs from the unsplit one"),
        ("rwkv", r"rwkv takes no transformers cache"),
        ("t5", r"t5 has an encoder"),
        ("gemma3n_text", r"gemma3n_text: no small twin can be made"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_reason(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=words) as raised:
        prove(AutoConfig.for_model(name), tmp_path)
    assert "\n" not in str(raised.value)


def test_the_outcome_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.for_model("llama")
    prove(config, tmp_path)
    monkeypatch.setattr(proof, "_outcome", lambda twin: pytest.fail("proved again"))
    prove(config, tmp_path)
    (tmp_path / next(tmp_path.iterdir()).name).write_text("not json")
    with pytest.raises(pytest.fail.Exception):
        prove(config, tmp_path)


def forget_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that ignores what the stage before computed."""
    monkeypatch.setattr(CutModel, "_received", lambda self: torch.zeros_like(self._incoming))


def shift_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = CutModel.forward

    def shifted(self: CutModel, ids: Any, positions: Any, *rest: Any) -> Any:
        return forward(self, ids, positions * 2, *rest)

    monkeypatch.setattr(CutModel, "forward", shifted)


def forget_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks whose oldest token is lost."""
    append = BlockStore.append

    def forgetful(self: BlockStore, view: BlockView, keys: Any, values: Any) -> Any:
        whole_keys, whole_values = append(self, view, keys, values)
        if view.past:
            whole_values[:, :, 0] = 0
        return whole_keys, whole_values

    monkeypatch.setattr(BlockStore, "append", forgetful)


@pytest.mark.parametrize("harm", [forget_activation, shift_positions, forget_history])
def test_the_proof_notices_faults(harm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harm(monkeypatch)
    with pytest.raises(UnsupportedModel, match="differs from the unsplit one"):
        prove(AutoConfig.for_model("llama"), tmp_path)


@pytest.mark.parametrize(
    ("name", "rope", "limit"),
    [
        ("llama", {"rope_type": "default", "rope_theta": 1e4}, None),
        (
            "llama",
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 99},
            None,
        ),
        ("llama", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 2048),
        (
            "llama",
            {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 99},
            99,
        ),
    ],
)
def test_rotary_tables_that_change_with_length_limit_the_context(
    name: str, rope: dict[str, Any], limit: int | None
) -> None:
    assert exact_context(AutoConfig.for_model(name, rope_parameters=rope)) == limit
