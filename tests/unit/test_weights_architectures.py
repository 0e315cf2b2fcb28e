"""Loading by name equals transformers' own loading, for many architectures, dense and quantized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import ARCHITECTURES, logits, make_config, make_model, make_skeleton
from transformers import AutoModelForCausalLM

from splitrun.kernels.formats import quantize
from splitrun.kernels.weight import Weight
from splitrun.model.rules import TensorRules
from splitrun.model.source import SafetensorsSource, checkpoint_format
from splitrun.model.weights import Loader


def reference(path: Path, name: str) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager")
    return model.eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loads_as_transformers_does(name: str, tmp_path: Path) -> None:
    make_model(name).save_pretrained(tmp_path)
    expected = reference(tmp_path, name)
    source = SafetensorsSource(tmp_path)
    assert checkpoint_format(source) == "fp32"
    skeleton = make_skeleton(make_config(name))
    loader = Loader(skeleton, source, torch.float32)
    assert loader.map.missing == ()
    assert loader.map.unexpected == ()
    names = list(skeleton.state_dict())
    loaded = loader.load(names, "fp32", "cpu")
    values = expected.state_dict()
    for key, tensor in skeleton.state_dict().items():
        assert torch.equal(tensor, values[key]), key
    assert torch.equal(logits(skeleton), logits(expected))
    own = {tensor.data_ptr(): tensor.nbytes for tensor in skeleton.parameters()}
    assert loader.nbytes(names, "fp32") == loaded.nbytes == sum(own.values()) + _buffer_bytes(loader)


def _buffer_bytes(loader: Loader) -> int:
    return loader.rules.nbytes([name for name in loader.rules.buffers if name in loader.map.recipes], "dense")


@pytest.mark.parametrize("format", ["int8", "nf4"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_quantized_equals_the_dequantized_reference(name: str, format: str, tmp_path: Path) -> None:
    make_model(name).save_pretrained(tmp_path)
    expected = reference(tmp_path, name)
    rules = TensorRules(expected, torch.float32)
    quantized = {key for key in rules.shapes if rules.format(key, format)}
    with torch.no_grad():
        for key, parameter in expected.named_parameters():
            if key in quantized:
                weight = quantize(parameter, format, torch.float32)
                assert isinstance(weight, Weight)
                parameter.copy_(weight.dequantize())
    skeleton = make_skeleton(make_config(name))
    loader = Loader(skeleton, SafetensorsSource(tmp_path), torch.float32)
    names = list(skeleton.state_dict())
    loaded = loader.load(names, format, "cpu")
    assert loaded.nbytes == loader.nbytes(names, format)
    for key in quantized:
        assert isinstance(skeleton.get_submodule(key.rpartition(".")[0]).__dict__[key.rpartition(".")[2]], Weight)
    torch.testing.assert_close(logits(skeleton), logits(expected), rtol=1e-5, atol=1e-5)
