"""Dummy weights of which one layer's are quantized and the others' are copies."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from splitrun.kernels.weight import Weight
from splitrun.model.cut import CutModel, CutRange
from splitrun.model.dummy import RepeatedSource
from splitrun.model.structure import inspect
from splitrun.model.weights import LoadedBytes, Loader

SHAPE = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "tie_word_embeddings": False,
}  # fmt: skip
GATE, QUERY = "model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.self_attn.q_proj.weight"


def load(made: dict[str, Weight], weights: str) -> tuple[CutModel, LoadedBytes]:
    config = AutoConfig.for_model("llama", **SHAPE)
    model = CutModel(config, inspect(config), CutRange(False, 0, 3, False), "bf16", "cpu")
    skeleton = model.skeleton.model
    source = RepeatedSource({name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}, made)
    loader = Loader(skeleton, source, torch.bfloat16)
    expected = loader.nbytes(model.own_names, weights)
    loaded = loader.load(model.own_names, weights, "cpu", keep=source.keep)
    assert loaded.nbytes == expected == loader.nbytes(model.own_names, weights)
    return model, loaded


def weight_of(model: CutModel, name: str) -> Weight:
    path, _, leaf = name.rpartition(".")
    weight: Weight = getattr(model.skeleton.model.get_submodule(path), leaf)
    return weight


@pytest.mark.parametrize("weights", ["int8", "nf4"])
def test_each_tensor_of_a_layer_is_quantized_once(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Weight] = {}
    model, _ = load(made, weights)
    assert len(made) == 7  # the matrices of one layer
    kinds = {type(weight) for weight in made.values()}
    for kind in kinds:
        monkeypatch.setattr(kind, "store", lambda *arguments: pytest.fail("quantized again"))
    again, _ = load(made, weights)
    gates = [weight_of(each, GATE.format(layer)) for each in (model, again) for layer in range(3)]
    assert {gate.format for gate in gates} == {weights}
    assert len({tensor.data_ptr() for gate in gates for tensor in gate.storage}) == 6 * len(gates[0].storage)
    for gate in gates[1:]:
        assert torch.equal(gate.dequantize(), gates[0].dequantize())
    x = torch.randn(2, 64).to(torch.bfloat16)
    assert torch.equal(gates[-1].apply(x), gates[0].apply(x))


def test_other_shapes_of_the_same_name_are_made_anew() -> None:
    made: dict[str, Weight] = {}
    load(made, "nf4")
    name = QUERY.format(0)
    source = RepeatedSource({name: (64, 64)}, made)
    other = RepeatedSource({name: (128, 64)}, made)
    assert (source.stored_format(name), other.stored_format(name)) == ("nf4", None)
    assert other.stored(name, torch.bfloat16) is None
    assert other.nbytes(name) == 2 * 128 * 64


def test_dense_values_are_not_kept() -> None:
    made: dict[str, Weight] = {}
    load(made, "bf16")
    assert made == {}
