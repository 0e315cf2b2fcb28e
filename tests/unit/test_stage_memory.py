"""Loading a stage never holds two copies of it."""

from __future__ import annotations

from transformers import AutoConfig

from splitrun.measure.timing import Setting, UnitBench
from splitrun.measure.unit_steps import Point
from splitrun.model.cut import CutRange
from splitrun.model.structure import inspect

LAYERS = 8
SIZES = {
    **{"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": LAYERS, "vocab_size": 64},
    **{"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 64},
}
LAYER_BYTES = 2 * (4 * 512 * 512 + 3 * 512 * 2048)


def test_layers_move_to_the_kernels_one_by_one() -> None:
    config = AutoConfig.for_model("llama", **SIZES)
    setting = Setting("cpu", "cpu", "bf16", "bf16", block_tokens=16, threads=1)
    bench = UnitBench(config, inspect(config), CutRange(False, 0, LAYERS, False), setting, [Point(1, 1, 8)])
    bench.close()
    assert bench.load_bytes < 3 * LAYER_BYTES
