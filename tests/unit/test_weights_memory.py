"""Loading needs the result and the pieces of one tensor, not a second copy; measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

VOCABULARY, HIDDEN, LAYERS = 8192, 1024, 4

LOAD = """
import json, sys, torch
from pathlib import Path
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, LlamaConfig
from splitrun.model.source import SafetensorsSource
from splitrun.model.weights import Loader

def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

directory, format, dtype = Path(sys.argv[1]), sys.argv[2], getattr(torch, sys.argv[3])
config = LlamaConfig(**json.loads((directory / "config.json").read_text()))
with init_empty_weights(include_buffers=False):
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
loader = Loader(model, SafetensorsSource(directory), dtype)
first, *others = sorted(model.state_dict(), key=lambda name: "layers.0.mlp.up_proj" not in name)
loader.load([first], format, "cpu")
before = resident("VmRSS")
loaded = loader.load(others, format, "cpu")
print(json.dumps({"result": loaded.nbytes, "peak": resident("VmHWM") - before, "now": resident("VmRSS") - before}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 200 MB in bf16, a third of it in the embedding and the head."""
    path = tmp_path_factory.mktemp("memory")
    shapes = {"model.embed_tokens.weight": (VOCABULARY * 3, HIDDEN), "lm_head.weight": (VOCABULARY * 3, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (3 * HIDDEN, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{prefix}mlp.down_proj.weight": (HIDDEN, 3 * HIDDEN)}
        shapes |= {f"{prefix}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (HIDDEN,)
    values = torch.randn(1 << 22).bfloat16()
    tensors = {name: values.repeat(8)[: torch.Size(shape).numel()].view(shape) for name, shape in shapes.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    config = {
        **{"vocab_size": VOCABULARY * 3, "hidden_size": HIDDEN, "intermediate_size": 3 * HIDDEN},
        **{"num_hidden_layers": LAYERS, "num_attention_heads": 16, "num_key_value_heads": 16},
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(("format", "dtype"), [("bf16", "bfloat16"), ("nf4", "bfloat16")])
def test_peak_while_loading(format: str, dtype: str, checkpoint: Path) -> None:
    arguments = [sys.executable, "-c", LOAD, str(checkpoint), format, dtype]
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=200, check=True)
    measured = json.loads(run.stdout)
    largest = 2 * 3 * VOCABULARY * HIDDEN
    assert measured["peak"] <= measured["result"] + largest, measured
    assert measured["now"] >= measured["result"] * 0.9
