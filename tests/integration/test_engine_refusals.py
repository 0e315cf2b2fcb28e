"""What broken checkpoints and impossible placements cost: one clear line, before anything runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from demo_engine import LAYERS, demo_placement
from safetensors.torch import load_file, save_file

import splitrun
import splitrun.schedule.request
from splitrun.demo import demo_path
from splitrun.errors import CorruptWeights, DoesNotFit, InvalidPlacement, MissingWeights, UnsupportedModel
from splitrun.planner.facts import Workload
from splitrun.planner.placement import KVSpec, ModelRef, Placement, StageSpec


def copy_demo(folder: Path) -> Path:
    """The demo as a directory of its own, to be broken."""
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        shutil.copy(demo_path() / name, folder)
    return folder


def set_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.6.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.self_attn.q_norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def write_garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)


def change_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 704
    (folder / "config.json").write_text(json.dumps(config))


def ask_for_remote_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "my_own", "auto_map": {"AutoConfig": "modeling.Config"}}
    (folder / "config.json").write_text(json.dumps(config))


def leave_only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("harm", "error", "words"),
    [
        (set_nan, CorruptWeights, r"model\.layers\.6\.mlp\.up_proj\.weight.*NaN.*cpu:1, layer 6"),
        (drop_tensor, MissingWeights, r"model\.layers\.2\.self_attn\.q_norm\.weight"),
        (truncate, CorruptWeights, "model.safetensors"),
        (write_garbage, CorruptWeights, "model.safetensors"),
        (change_width, MissingWeights, "640.*704|704.*640"),
        (ask_for_remote_code, UnsupportedModel, "code"),
        (leave_only_pickles, UnsupportedModel, "pickle"),
    ],
)
def test_a_broken_checkpoint_is_one_clear_line(
    tmp_path: Path, harm: object, error: type[Exception], words: str
) -> None:
    folder = copy_demo(tmp_path)
    harm(folder)
    with pytest.raises(error, match=words) as raised:
        splitrun.Engine(demo_placement(str(folder)))
    assert "\n" not in str(raised.value)


def test_a_changed_model_makes_the_placement_stale(tmp_path: Path) -> None:
    folder = copy_demo(tmp_path)
    plan = splitrun.plan(str(folder), context=256, weights="bf16")
    change_width(folder)
    with pytest.raises(InvalidPlacement, match=r"changed since it was planned: plan again with splitrun plan"):
        splitrun.Engine(plan)


def test_a_placement_of_other_layers_is_refused() -> None:
    plan = Placement(1, ModelRef("demo", layers=6), Workload(256), (StageSpec("cpu", True, (0, 6), True),))
    with pytest.raises(InvalidPlacement, match="splits 6 layers, but demo has 8"):
        splitrun.Engine(plan)


@pytest.mark.parametrize(
    ("device", "fields", "words"),
    [
        ("cuda:97", {}, "no such device here; `splitrun doctor` lists"),
        ("attic/cpu", {}, "attic/cpu: this machine is no node yet"),
        ("cpu", {"stream_buffer_bytes": 4096}, "stream_buffer 4096 is memory of a card"),
        ("cuda:0", {"stream_from_tokens": 64}, "stream_from 64 is for layers on the processor"),
        ("cpu", {"kv": KVSpec(host_blocks=3)}, "host_blocks 3 is not supported"),
    ],
)
def test_what_cannot_be_done_is_refused_before_loading(device: str, fields: dict[str, object], words: str) -> None:
    stage = StageSpec(device, True, (0, LAYERS), True, **fields)
    with pytest.raises(InvalidPlacement, match=words):
        splitrun.Engine(Placement(1, ModelRef("demo", layers=LAYERS), Workload(256), (stage,)))


@pytest.mark.parametrize(
    ("sessions", "budget", "words"),
    [
        (
            60000,
            "1GiB",
            r"KV of cpu take .* its budget is 1.00 GiB: give it more, or plan again with a shorter context "
            r"\(now 512\), fewer sessions \(now 60000\) or leaner weights",
        ),
        (1, "1MiB", r"take .* MiB, but its budget is 1.00 MiB"),
        (65536, None, r"but free there are"),
    ],
)
def test_a_placement_by_hand_is_held_to_memory(tmp_path: Path, sessions: int, budget: str | None, words: str) -> None:
    file = tmp_path / "plan.yaml"
    devices = f"devices: {{cpu: {{memory: {budget}}}}}\n" if budget else ""
    file.write_text(
        f"version: 1\nmodel: {{source: demo}}\nworkload: {{context: 512, sessions: {sessions}}}\n{devices}"
        "stages:\n  - {device: cpu, units: [embed, head], layers: [0, 8]}\n"
    )
    with pytest.raises(DoesNotFit, match=words) as raised:
        splitrun.Engine(file)
    assert raised.value.shortfall_bytes["cpu"] > 0


def test_a_context_beyond_the_model_is_refused() -> None:
    plan = Placement(1, ModelRef("demo", layers=8), Workload(8192), (StageSpec("cpu", True, (0, 8), True),))
    with pytest.raises(InvalidPlacement, match="holds 8192 tokens, but demo computes at most 4096 exactly"):
        splitrun.Engine(plan)
