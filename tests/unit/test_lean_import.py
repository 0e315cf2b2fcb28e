"""transformers without torch's compiler: models run as ever, and the compiler still works for who wants it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

LEAN = """
import sys
from splitrun.model.lean_import import import_transformers
assert import_transformers()
assert not import_transformers()
assert not {"sympy", "torch._dynamo", "torch.distributed.tensor"} & set(sys.modules)
import torch, transformers
assert torch.distributed.is_available()
config = transformers.Gemma3TextConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                       num_key_value_heads=2, intermediate_size=64, head_dim=32, sliding_window=4)
model = transformers.AutoModelForCausalLM.from_config(config).eval()
with torch.inference_mode():
    assert torch.isfinite(model(torch.arange(3, 11).view(1, 8)).logits).all()
assert "torch._dynamo" not in sys.modules
doubled = torch.compile(lambda x: x * 2, backend="eager")(torch.ones(3))
assert torch.equal(doubled, torch.full((3,), 2.0)) and "torch._dynamo" in sys.modules
print("done")
"""

REFUSED = """
import sys
from splitrun.model.lean_import import import_transformers
assert not import_transformers(("transformers.modeling_utils", "transformers.no_such_module"))
assert "transformers" not in sys.modules
import transformers.modeling_utils, torch
assert "torch._dynamo" in sys.modules
print("done")
"""


TESTED = """
import sys
from splitrun.kernels.cpu import library, many
library.kernel(), many.many_rows(), many.attention_rows()
assert not {"bitsandbytes", "torch._dynamo"} & set(sys.modules)
print("done")
"""

REMEMBERED = """
import pathlib
from splitrun.model.import_structure import remembered
with remembered():
    import transformers
from transformers.utils.import_utils import create_import_structure_from_path as look, spread_import_structure
models = pathlib.Path(transformers.__file__).parent / "models"
from transformers.utils import import_utils
read = []
import_utils.create_import_structure_from_path = lambda path: read.append(path) or look(path)
found = import_utils.define_import_structure(models)
assert not read and found == spread_import_structure(look(models))
assert "models.llama.modeling_llama" in import_utils.define_import_structure(models, "models")[frozenset({"torch"})]
print("done")
"""


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_compiler_is_loaded_only_when_it_is_wanted() -> None:
    assert run(LEAN) == "done\n"


def test_a_transformers_that_cannot_be_imported_leanly_is_imported_as_usual() -> None:
    assert run(REFUSED) == "done\n"


def test_the_kernels_test_themselves_without_bitsandbytes() -> None:
    assert run(TESTED) == "done\n"


def test_what_model_files_export_is_remembered_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPLITRUN_CACHE", str(tmp_path))
    for content in (None, "{", None):  # nothing kept yet, something broken, what the last one kept
        if content is not None:
            (tmp_path / "import_structure.json").write_text(content)
        assert run(REMEMBERED) == "done\n"
    assert json.loads((tmp_path / "import_structure.json").read_text())["names"]
