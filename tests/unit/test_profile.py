"""Profiles of tiny models: the bytes that loading takes, what a token reads and multiplies, ties, groups, contexts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import make_config, make_model

from splitrun.measure.profile import ENDLESS_CONTEXT, active_experts, max_context, profile
from splitrun.model.files import ModelFiles, resolve
from splitrun.model.skeleton import build_skeleton
from splitrun.model.structure import inspect
from splitrun.model.weights import Loader
from splitrun.planner.facts import FORMATS, ModelProfile


def files_of(name: str, **changes: Any) -> ModelFiles:
    """A model that is known by its config alone."""
    config = make_config(name)
    for key, value in changes.items():
        setattr(config, key, value)
    files = ModelFiles(name, None, Path("nowhere"), config, weights=False)
    files.__dict__["fingerprint"] = "sha256:test"
    return files


def profile_of(name: str, **changes: Any) -> ModelProfile:
    return profile(files_of(name, **changes))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3_moe", "gpt2", "opt", "gemma3_text", "bloom"])
def test_all_units_together_take_what_loading_everything_takes(name: str, tmp_path: Path) -> None:
    make_model(name).save_pretrained(tmp_path)
    files = resolve(str(tmp_path))
    facts = profile(files)
    structure = inspect(files.config)
    everything = [info.name for info in structure.parameters]
    assert facts.fingerprint.startswith("sha256:")
    for weights in FORMATS:
        dtype = torch.float32 if weights == "fp32" else torch.bfloat16
        loader = Loader(build_skeleton(files.config, "bf16").model, files.source, dtype)
        total = sum(unit.weight_bytes[weights] for unit in facts.units)
        assert total - facts.tied_bytes.get(weights, 0) == loader.nbytes(everything, weights)


def test_units_of_a_dense_model() -> None:
    facts = profile_of("llama")
    assert [unit.name for unit in facts.units] == ["embed", "layer 0", "layer 1", "head"]
    embed, layer, _, head = facts.units
    table = 128 * 64
    assert embed.weight_bytes["bf16"] == 2 * table
    assert embed.read_bytes["bf16"] == 2 * 64  # one row
    assert (embed.flops_per_token, embed.kv_values_per_token) == (0, {})
    # q and o are 64 x 64, k and v 32 x 64, three MLP matrices 128 x 64; norms are not multiplied as matrices.
    values = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64
    assert layer.flops_per_token == 2 * values
    assert layer.read_bytes == layer.weight_bytes
    assert layer.weight_bytes["bf16"] == 2 * (values + 2 * 64)
    assert (layer.kv_values_per_token, layer.kv_heads) == ({"full": 2 * 2 * 16}, 2 * 2)
    assert layer.largest_weight_values == 128 * 64
    assert layer.activation_values_per_token == 3 * 128
    assert head.read_bytes["bf16"] == 2 * (table + 64)
    assert head.flops_per_token == 2 * table
    assert (facts.hidden_values, facts.vocabulary, facts.max_context, facts.tied_bytes) == (64, 128, 64, {})


def test_tied_tensors_are_in_both_units_and_named_once() -> None:
    facts = profile_of("llama-tied")  # by its config, as for dummy weights
    assert facts.tied_bytes["bf16"] == 2 * 128 * 64
    assert facts.units[0].weight_bytes["bf16"] == facts.tied_bytes["bf16"]
    assert facts.units[-1].weight_bytes["bf16"] == facts.tied_bytes["bf16"] + 2 * 64


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "olmoe"])
def test_a_token_reads_and_multiplies_its_active_experts_only(name: str) -> None:
    half, whole = profile_of(name).units[1], profile_of(name, num_experts_per_tok=4).units[1]
    assert half.weight_bytes == whole.weight_bytes
    assert whole.read_bytes == whole.weight_bytes
    experts = 2 * (whole.read_bytes["bf16"] - half.read_bytes["bf16"])  # two of four are active
    assert 0 < experts < whole.weight_bytes["bf16"]
    assert whole.flops_per_token - half.flops_per_token == experts / 2  # 2 bytes and 2 operations a value


def test_groups_keep_their_own_bytes() -> None:
    facts = profile_of("gemma3_text")
    names = {group.name for group in facts.groups}
    assert {name for unit in facts.units for name in unit.kv_values_per_token} == names
    assert "sliding(8)" in names


def test_learned_positions_are_read_by_the_row() -> None:
    embed = profile_of("gpt2").units[0]
    assert embed.read_bytes["bf16"] == 2 * (64 + 64)  # a token's row and a position's
    assert embed.flops_per_token == 0


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024}, 1024),
        ({"max_seq_len": 2048}, 2048),
        ({"max_position_embeddings": None, "seq_length": 512}, 512),
        ({}, ENDLESS_CONTEXT),
    ],
)
def test_longest_context(fields: dict[str, Any], length: int) -> None:
    text = SimpleNamespace(**fields)
    assert max_context(SimpleNamespace(get_text_config=lambda decoder: text)) == length


@pytest.mark.parametrize(
    ("fields", "count"),
    [({"num_experts_per_tok": 2}, 2), ({"moe_topk": [1, 3]}, 3), ({}, None), ({"moe_k": None}, None)],
)
def test_active_experts(fields: dict[str, Any], count: int | None) -> None:
    text = SimpleNamespace(**fields)
    assert active_experts(SimpleNamespace(get_text_config=lambda decoder: text)) == count
