"""Names on disk to names in the model: prefixes, ties, what is missing, unexpected or of another shape."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import logits, make_config, make_model, make_skeleton
from torch import Tensor
from transformers import core_model_loading

from splitrun.errors import CorruptWeights, MissingWeights, UnsupportedModel
from splitrun.kernels.nf4 import Nf4Weight
from splitrun.model.late_patterns import LatePattern, compiled_late
from splitrun.model.names import NameMap
from splitrun.model.source import SafetensorsSource
from splitrun.model.weights import Loader


def saved(path: Path, name: str = "llama") -> dict[str, Tensor]:
    make_model(name).save_pretrained(path)
    return load_file(path / "model.safetensors")


def write(path: Path, tensors: dict[str, Tensor]) -> SafetensorsSource:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return SafetensorsSource(path)


def test_one_tensor_on_disk_per_plain_parameter(tmp_path: Path) -> None:
    tensors = saved(tmp_path)
    names = NameMap(make_skeleton(make_config("llama")), SafetensorsSource(tmp_path))
    assert {name: names.sources(name) for name in names.recipes} == {name: (name,) for name in tensors}


def test_experts_are_made_from_one_tensor_each(tmp_path: Path) -> None:
    saved(tmp_path, "mixtral")
    names = NameMap(make_skeleton(make_config("mixtral")), SafetensorsSource(tmp_path))
    sources = names.sources("model.layers.1.mlp.experts.gate_up_proj")
    assert sorted(sources) == sorted(
        f"model.layers.1.block_sparse_moe.experts.{expert}.{part}.weight"
        for expert in range(4)
        for part in ("w1", "w3")
    )
    recipe = names.recipes["model.layers.1.mlp.experts.gate_up_proj"]
    skeleton = make_skeleton(make_config("mixtral"))
    source = SafetensorsSource(tmp_path)
    pieces = list(recipe.pieces(skeleton, source))
    assert [(start, tuple(values.shape)) for _, start, values in pieces] == [
        (index, (1, 256, 64)) for index in range(4)
    ]


@pytest.mark.parametrize("prefix", ["model.", "base.only"])
def test_checkpoints_saved_from_the_base_model(prefix: str, tmp_path: Path) -> None:
    """Without "model." before each name; the head's weights tied, so that nothing is missing."""
    tensors = saved(tmp_path, "llama-tied")
    expected = make_model("llama-tied")
    if prefix == "base.only":
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    skeleton = make_skeleton(make_config("llama-tied"))
    loader = Loader(skeleton, write(tmp_path, tensors), torch.float32)
    assert loader.map.missing == loader.map.unexpected == ()
    loader.load(list(skeleton.state_dict()), "fp32", "cpu")
    assert torch.equal(logits(skeleton), logits(expected))


@pytest.mark.parametrize("held", ["embedding", "head", "both"])
@pytest.mark.parametrize("format", ["fp32", "nf4"])
def test_tied_weights_share_one_object(held: str, format: str, tmp_path: Path) -> None:
    tensors = saved(tmp_path, "llama-tied")
    tensors.pop("lm_head.weight", None)
    embedding = tensors["model.embed_tokens.weight"]
    if held != "embedding":
        tensors["lm_head.weight"] = embedding.clone()
    if held == "head":
        del tensors["model.embed_tokens.weight"]
    source = write(tmp_path, tensors)
    skeleton = make_skeleton(make_config("llama-tied"))
    loader = Loader(skeleton, source, torch.float32)
    assert loader.map.missing == ()
    ends = ["model.embed_tokens.weight", "lm_head.weight"]
    loaded = loader.load(ends, format, "cpu")
    assert skeleton.lm_head.weight is skeleton.model.embed_tokens.weight
    assert loaded.nbytes == loader.nbytes(ends, format) == loader.nbytes(ends[:1], format)

    head_only = make_skeleton(make_config("llama-tied"))
    loader = Loader(head_only, source, torch.float32)
    loader.load(["lm_head.weight"], format, "cpu")
    weight = head_only.lm_head.weight
    if format == "fp32":
        assert torch.equal(weight, embedding)
    else:
        assert isinstance(weight, Nf4Weight)
    assert head_only.model.embed_tokens.weight.device.type == "meta"


def test_tied_by_config_but_different_on_disk(tmp_path: Path) -> None:
    """transformers then believes the tensors, not the config."""
    tensors = saved(tmp_path, "llama-tied")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    source = write(tmp_path, tensors)
    skeleton = make_skeleton(make_config("llama-tied"))
    loader = Loader(skeleton, source, torch.float32)
    loader.load(list(skeleton.state_dict()), "fp32", "cpu")
    assert loader.map.ties == {}
    assert torch.equal(skeleton.lm_head.weight, tensors["lm_head.weight"])
    assert torch.equal(skeleton.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])


def test_only_the_wanted_names_are_filled(tmp_path: Path) -> None:
    saved(tmp_path)
    skeleton = make_skeleton(make_config("llama"))
    loader = Loader(skeleton, SafetensorsSource(tmp_path), torch.float32)
    wanted = [name for name in skeleton.state_dict() if ".layers.1." in name]
    assert loader.load(wanted, "fp32", "cpu").names == tuple(wanted)
    filled = [name for name, tensor in skeleton.named_parameters() if tensor.device.type != "meta"]
    assert filled == wanted


def test_missing_tensors_are_named_when_they_are_wanted(tmp_path: Path) -> None:
    tensors = saved(tmp_path)
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    skeleton = make_skeleton(make_config("llama"))
    loader = Loader(skeleton, write(tmp_path, tensors), torch.float32)
    assert set(loader.map.missing) == {"model.layers.1.mlp.up_proj.weight", "model.norm.weight"}
    loader.load([name for name in skeleton.state_dict() if ".layers.0." in name], "fp32", "cpu")
    with pytest.raises(MissingWeights, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight and 1 more"):
        loader.load(list(skeleton.state_dict()), "fp32", "cpu")


def test_a_missing_expert_is_not_overlooked(tmp_path: Path) -> None:
    tensors = saved(tmp_path, "mixtral")
    del tensors["model.layers.0.block_sparse_moe.experts.2.w2.weight"]
    skeleton = make_skeleton(make_config("mixtral"))
    with pytest.raises(MissingWeights, match=r"experts\.down_proj has shape \[3, 64, 128\].*\[4, 64, 128\]"):
        Loader(skeleton, write(tmp_path, tensors), torch.float32).load(list(skeleton.state_dict()), "fp32", "cpu")


def test_half_an_expert_missing_is_refused(tmp_path: Path) -> None:
    tensors = saved(tmp_path, "mixtral")
    del tensors["model.layers.0.block_sparse_moe.experts.2.w1.weight"]
    with pytest.raises(UnsupportedModel, match=r"experts\.gate_up_proj cannot be converted"):
        NameMap(make_skeleton(make_config("mixtral")), write(tmp_path, tensors))


def test_unexpected_tensors_are_named_and_known_leftovers_are_not(tmp_path: Path) -> None:
    tensors = saved(tmp_path)
    tensors["model.layers.0.self_attn.extra.weight"] = torch.zeros(3)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)
    names = NameMap(make_skeleton(make_config("llama")), write(tmp_path, tensors))
    assert names.unexpected == ("model.layers.0.self_attn.extra.weight",)


def test_shapes_that_disagree_with_the_config(tmp_path: Path) -> None:
    tensors = saved(tmp_path)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(120, 64)
    skeleton = make_skeleton(make_config("llama"))
    loader = Loader(skeleton, write(tmp_path, tensors), torch.float32)
    expected = r"layers\.1\.mlp\.up_proj\.weight has shape \[120, 64\] in model\.safetensors, but .* \[128, 64\]"
    with pytest.raises(MissingWeights, match=expected):
        loader.load(list(skeleton.state_dict()), "fp32", "cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("format", ["fp32", "int8", "nf4"])
def test_values_that_are_no_numbers_name_tensor_stage_and_layer(value: float, format: str, tmp_path: Path) -> None:
    tensors = saved(tmp_path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    skeleton = make_skeleton(make_config("llama"))
    loader = Loader(skeleton, write(tmp_path, tensors), torch.float32)
    with pytest.raises(CorruptWeights) as caught:
        loader.load(list(skeleton.state_dict()), format, "cpu", lambda name: f"stage 2, layer {name.split('.')[2]}")
    for part in ("model.layers.1.mlp.up_proj.weight", "model.safetensors", "stage 2, layer 1", "NaN or infinite"):
        assert part in str(caught.value)


def test_what_must_stay_in_float32_does(tmp_path: Path) -> None:
    """As transformers decides; DeepSeek's routing corrections stay fp32 when the rest is bf16."""
    for name, kept in (("deepseek_v3", "e_score_correction_bias"), ("mamba", None)):
        path = tmp_path / name
        make_model(name, torch.bfloat16).save_pretrained(path)
        expected = type(make_model(name)).from_pretrained(path, dtype=torch.bfloat16)
        skeleton = make_skeleton(make_config(name), torch.bfloat16)
        loader = Loader(skeleton, SafetensorsSource(path), torch.bfloat16)
        loader.load(list(skeleton.state_dict()), "bf16", "cpu")
        types = {key: tensor.dtype for key, tensor in expected.state_dict().items()}
        assert {key: tensor.dtype for key, tensor in skeleton.state_dict().items()} == types
        assert kept is None or {value for key, value in types.items() if kept in key} == {torch.float32}


def test_a_dense_format_other_than_the_compute_type_is_our_own_mistake(tmp_path: Path) -> None:
    saved(tmp_path)
    skeleton = make_skeleton(make_config("llama"))
    with pytest.raises(ValueError, match="compute dtype"):
        Loader(skeleton, SafetensorsSource(tmp_path), torch.float32).load(["lm_head.weight"], "bf16", "cpu")


def test_patterns_that_nobody_uses_are_not_compiled() -> None:
    with compiled_late(core_model_loading):
        late, broken = (core_model_loading.WeightRenaming(source, "other.weight") for source in ("own.weight", "(own"))
    at_once = core_model_loading.WeightRenaming("own.weight", "other.weight")
    assert core_model_loading.re is re
    assert isinstance(late.compiled_sources, LatePattern)
    for renaming in (late, deepcopy(late)):
        for name in ("model.own.weight", "model.own.weight_scale"):
            assert renaming.rename_source_key(name) == at_once.rename_source_key(name)
    with pytest.raises(re.error):
        broken.rename_source_key("own")
