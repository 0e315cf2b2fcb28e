"""Checkpoints that bitsandbytes quantized load as they are: same values, same bytes, nothing quantized twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import logits, make_config, make_model, make_skeleton
from torch import Tensor

from splitrun.errors import CorruptWeights, UnsupportedModel
from splitrun.kernels.int8 import Int8Weight
from splitrun.kernels.nf4 import Nf4Weight
from splitrun.model.quantized_checkpoint import with_quantization
from splitrun.model.source import SafetensorsSource, checkpoint_format
from splitrun.model.weights import Loader

FOUR_BITS = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
EIGHT_BITS = {"load_in_8bit": True, "quant_method": "bitsandbytes"}


def four_bits(weight: Tensor, kind: str, block: int, nested: bool) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a checkpoint for one weight, by the name's ending, and bitsandbytes' own values."""
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(weight, blocksize=block, quant_type=kind, compress_statistics=nested)
    tensors = {".weight": packed, **{f".weight.{key}": value for key, value in state.as_dict(packed=True).items()}}
    if weight.shape[-1] % block == 0:
        return tensors, functional.dequantize_4bit(packed, state)
    # bitsandbytes' own CPU kernel is wrong where blocks cross rows: the definition instead
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1, block).long()
    return tensors, (state.code[codes] * state.absmax.unsqueeze(1)).view(weight.shape)


def eight_bits(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scales = weight.abs().amax(-1)
    codes = torch.round(weight * 127 / scales.unsqueeze(-1)).to(torch.int8)
    tensors = {".weight": codes, ".SCB": scales, ".weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, codes.float() * scales.unsqueeze(-1) / 127


def rewrite(path: Path, change: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]) -> Any:
    """Quantize every linear layer of a saved llama; returns the model with the dequantized values."""
    model = make_model("llama")
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                del tensors[name]
                made, values = change(parameter.detach())
                tensors |= {name.removesuffix(".weight") + ending: tensor for ending, tensor in made.items()}
                parameter.copy_(values)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return model


def load(path: Path, quantization: dict[str, Any] | None, weight_format: str = "nf4") -> tuple[Any, Loader]:
    source = with_quantization(SafetensorsSource(path), quantization)
    skeleton = make_skeleton(make_config("llama"))
    loader = Loader(skeleton, source, torch.float32)
    names = list(skeleton.state_dict())
    planned = loader.nbytes(names, weight_format)
    assert loader.map.missing == loader.map.unexpected == ()
    assert loader.load(names, weight_format, "cpu").nbytes == planned
    return skeleton, loader


@pytest.mark.parametrize(
    ("kind", "block", "nested"),
    [("nf4", 64, False), ("nf4", 64, True), ("nf4", 128, False), ("fp4", 64, False), ("fp4", 64, True)],
)
def test_four_bit_checkpoint(kind: str, block: int, nested: bool, tmp_path: Path) -> None:
    expected = rewrite(tmp_path, lambda weight: four_bits(weight, kind, block, nested))
    skeleton, loader = load(tmp_path, FOUR_BITS)
    assert checkpoint_format(loader.source) == "nf4"
    for name, parameter in expected.named_parameters():
        found = skeleton.get_submodule(name.rpartition(".")[0]).weight
        if "down_proj" in name or ("_proj" in name and block == 64):
            assert isinstance(found, Nf4Weight)
            assert found.block == block
        else:
            assert isinstance(found, torch.nn.Parameter)
        assert torch.equal(found.dequantize() if isinstance(found, Nf4Weight) else found, parameter), name
    torch.testing.assert_close(logits(skeleton), logits(expected), rtol=1e-5, atol=1e-5)


def test_eight_bit_checkpoint(tmp_path: Path) -> None:
    expected = rewrite(tmp_path, eight_bits)
    skeleton, loader = load(tmp_path, EIGHT_BITS)
    assert checkpoint_format(loader.source) == "int8"
    assert isinstance(skeleton.model.layers[0].mlp.up_proj.weight, Int8Weight)
    assert isinstance(skeleton.lm_head.weight, torch.nn.Parameter)
    torch.testing.assert_close(logits(skeleton), logits(expected), rtol=1e-5, atol=1e-5)


def test_checkpoint_saved_by_transformers(tmp_path: Path) -> None:
    """What save_pretrained writes for a model that was quantized while loading."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    make_model("llama").save_pretrained(tmp_path / "plain")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32, quantization_config=settings)
    model.save_pretrained(tmp_path / "quantized")
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    skeleton, _ = load(tmp_path / "quantized", config["quantization_config"])
    original = load_file(tmp_path / "plain" / "model.safetensors")
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        weight = skeleton.get_submodule(name).weight
        assert isinstance(weight, Nf4Weight)
        error = (weight.dequantize() - original[name + ".weight"]).norm() / original[name + ".weight"].norm()
        assert 0.01 < error < 0.15


def test_experts_of_a_quantized_checkpoint_keep_their_values(tmp_path: Path) -> None:
    """Experts lie one by one on disk and as a stack in the model: stacking must not round a second time."""
    model = make_model("mixtral")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if "experts" in name]:
        made, _ = four_bits(tensors.pop(name), "nf4", 64, False)
        tensors |= {name.removesuffix(".weight") + ending: tensor for ending, tensor in made.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    source = with_quantization(SafetensorsSource(tmp_path), FOUR_BITS)
    skeleton = make_skeleton(make_config("mixtral"))
    Loader(skeleton, source, torch.float32).load(list(skeleton.state_dict()), "nf4", "cpu")
    stack = skeleton.model.layers[1].mlp.experts.down_proj
    assert isinstance(stack, Nf4Weight)
    disk = [name for name in source.names() if "layers.1" in name and name.endswith("experts.2.w2.weight")]
    assert torch.equal(stack[2].dequantize(), source.read(disk[0]))


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "compressed-tensors"])
def test_other_methods_are_refused_by_name(method: str, tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=method):
        with_quantization(SafetensorsSource(tmp_path), {"quant_method": method})


def test_whole_numbers_without_a_quantization_config_are_refused(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CorruptWeights, match=r"layers\.1\.mlp\.up_proj\.weight in model\.safetensors is of type int8"):
        load(tmp_path, None)


STATE = {"blocksize": 64, "dtype": "bfloat16", "shape": [96, 64]}


@pytest.mark.parametrize(
    "state", [{}, {**STATE, "blocksize": 0}, {**STATE, "shape": []}, {**STATE, "shape": [-96, -64]}]
)
def test_broken_state_names_the_tensor(tmp_path: Path, state: dict[str, object]) -> None:
    rewrite(tmp_path, lambda weight: four_bits(weight, "nf4", 64, False))
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    tensors[name] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CorruptWeights, match=r"layers\.1\.mlp\.up_proj"):
        load(tmp_path, FOUR_BITS)


def test_nan_scale_names_the_tensor(tmp_path: Path) -> None:
    rewrite(tmp_path, eight_bits)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.SCB"][3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CorruptWeights, match=r"layers\.0\.mlp\.up_proj"):
        load(tmp_path, EIGHT_BITS)
