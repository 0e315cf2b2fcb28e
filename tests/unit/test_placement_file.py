"""The placement file: every fault names file, line and key; nothing else than InvalidPlacement comes out."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitrun.errors import InvalidPlacement
from splitrun.planner.facts import Workload
from splitrun.planner.placement import KVSpec, ModelRef, Placement, StageSpec

VALID = """\
version: 1
model: {source: demo, revision: null, layers: 8, fingerprint: "sha256:ab"}
workload: {context: 4096, sessions: 1, objective: latency}
block_tokens: 64
stages:
  - {device: cpu, units: [embed]}
  - {device: "cuda:0", layers: [0, 6], weights: nf4,
     kv: {dtype: bf16, device_blocks: 64, host_blocks: 0, disk_blocks: 0}, stream_buffer: 0MB}
  - {device: cpu, layers: [6, 8], weights: int8, threads: auto, stream_from: 64}
  - {device: "cuda:0", units: [head], weights: bf16}
devices: {"cuda:0": {memory: 4GiB}, cpu: {memory: 8GiB}}
"""


def load(folder: Path, content: str | bytes) -> Placement:
    file = folder / "mine.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return Placement.load(file)


def test_the_design_example(tmp_path: Path) -> None:
    assert load(tmp_path, VALID) == Placement(
        1,
        ModelRef("demo", None, 8, "sha256:ab"),
        Workload(4096, 1, "latency", 512, 64),
        (
            StageSpec("cpu", True, (0, 0), False),
            StageSpec("cuda:0", False, (0, 6), False, "nf4", KVSpec("bf16", 64)),
            StageSpec("cpu", False, (6, 8), False, "int8", stream_from_tokens=64),
            StageSpec("cuda:0", False, (8, 8), True),
        ),
        {"cuda:0": 4 << 30, "cpu": 8 << 30},
    )


def test_only_what_is_required(tmp_path: Path) -> None:
    short = "version: 1\nmodel: {source: demo}\nstages:\n- device: cpu\n  units: [embed, head]\n  layers: [0, 8]\n"
    plan = load(tmp_path, short)
    assert plan.stages == (StageSpec("cpu", True, (0, 8), True),)
    assert (plan.layers, plan.model.layers, plan.devices, plan.workload) == (8, None, {}, Workload())
    assert load(tmp_path, b"\xef\xbb\xbf" + short.encode()) == plan  # with a byte order mark


# (what to replace in VALID, by what, line of the fault, what the message says)
FAULTS = [
    ("version: 1", "version: 2", 1, "version: this splitrun reads version 1"),
    ("version: 1", "version: one", 1, "version: 'one' is not a whole number"),
    ("version: 1", "version: 1.0", 1, "version: '1.0' is not a whole number"),
    ("version: 1", "versions: 1", 1, "the file: unknown key 'versions', did you mean 'version'?"),
    ("version: 1\n", "", 1, "the file: key 'version' is missing"),
    ("source: demo", "source: 12", 2, "model.source: '12' must be text; put quotes around it"),
    ("source: demo", "source: ''", 2, "model.source: must not be empty"),
    ("source: demo", "source: null", 2, "model.source: must be text"),
    ("source: demo", "source: [demo]", 2, "model.source: must be text, not a list"),
    ("source: demo", 'source: "a\\nb"', 2, "model.source: 'a\\nb' holds characters that cannot be printed"),
    ("source: demo, ", "", 2, "model: key 'source' is missing"),
    ("layers: 8,", "layers: 0,", 2, "model.layers: 0 is out of range"),
    ("layers: 8,", "layers: 1e999,", 2, "model.layers: '1e999' is not a whole number"),
    ("layers: 8,", "layers: 0x8,", 2, "model.layers: '0x8' is not a whole number"),
    ("layers: 8,", "layers: 7,", 9, "stages[2].layers: layers [6, 8] go beyond the model's 7 layers"),
    ("layers: 8,", "layers: 9,", 10, "stages[3].units: layer 8 is missing"),
    ("model: {", "model: [", 2, "not YAML"),
    ("context: 4096", "context: -1", 3, "workload.context: -1 is out of range"),
    ("context: 4096", "context: 99999999999", 3, "workload.context: 99999999999 is out of range"),
    ("context: 4096", "context: " + "9" * 5000, 3, "is not a whole number"),
    ("context: 4096", "context: .nan", 3, "workload.context: '.nan' is not a whole number"),
    ("context: 4096", "context: '4096'", 3, "workload.context: '4096' is not a whole number"),
    ("sessions: 1", "sessions: true", 3, "workload.sessions: 'true' is not a whole number"),
    ("sessions: 1", "session: 1", 3, "unknown key 'session', did you mean 'sessions'?"),
    ("objective: latency", "objective: latncy", 3, "'latncy' is unknown, did you mean 'latency'?"),
    ("block_tokens: 64", "block_tokens: 0", 4, "block_tokens: 0 is out of range"),
    ("block_tokens: 64", "streams: 0", 4, "streams: 0 is out of range"),
    ("block_tokens: 64", "version: 1", 4, "key 'version' is given twice, first on line 1"),
    ("{device: cpu, units: [embed]}", "{device: cpu, device: cpu, units: [embed]}", 6, "key 'device' is given twice"),
    ("{device: cpu, units: [embed]}", "{units: [embed]}", 6, "stages[0]: key 'device' is missing"),
    ("{device: cpu, units: [embed]}", "{device: cpu}", 6, "stages[0]: the stage computes nothing"),
    ("{device: cpu, units: [embed]}", "cpu", 6, "stages[0]: must be a mapping, not 'cpu'"),
    ("device: cpu, units: [embed]", "device: gpu, units: [embed]", 6, "stages[0].device: 'gpu' is not a device"),
    ("device: cpu, units: [embed]", "device: 'cpu:0', units: [embed]", 6, "'cpu:0' is not a device"),
    ("[embed]", "[embd]", 6, "stages[0].units[0]: 'embd' is unknown, did you mean 'embed'?"),
    ("[embed]", "[embed, embed]", 6, "stages[0].units: embed and head may each be named once"),
    ("[embed]", "[head, embed]", 6, "stages[0].units: embed and head may each be named once, embed first"),
    ("[embed]", "[]", 6, "stages[0].units: must name embed, head or both"),
    ("[embed]", "embed", 6, "stages[0].units: must be a list, not 'embed'"),
    ("[embed]", "[embed], layers: [1, 2]", 6, "stages[0].layers: embed comes before layer 0"),
    ("[0, 6]", "[0, 5]", 9, "stages[2].layers: layer 5 is missing"),
    ("[0, 6]", "[0, 7]", 9, "stages[2].layers: layer 6 is computed twice"),
    ("[0, 6]", "[1, 6]", 7, "stages[1].layers: layer 0 is missing"),
    ("[0, 6]", "[6, 0]", 7, "stages[1].layers: [6, 0] is empty"),
    ("[0, 6]", "[3, 3]", 7, "stages[1].layers: [3, 3] is empty"),
    ("[0, 6]", "[-1, 6]", 7, "stages[1].layers[0]: -1 is out of range"),
    ("[0, 6]", "[0, 6, 7]", 7, "stages[1].layers: must be [first, end]"),
    ("[0, 6]", "6", 7, "stages[1].layers: must be a list"),
    ("[0, 6]", "[0, 99999999999999999999]", 7, "stages[1].layers[1]"),
    ("weights: nf4", "weights: nf5", 7, "stages[1].weights: 'nf5' is unknown, did you mean 'nf4'?"),
    ("weights: nf4", "weight: nf4", 7, "stages[1]: unknown key 'weight', did you mean 'weights'?"),
    ("dtype: bf16", "dtype: int4", 8, "stages[1].kv.dtype: 'int4' is unknown"),
    ("dtype: bf16", "dtype: int8", 8, "stages[1].kv.dtype: int8 keys and values are for processors, not cuda:0"),
    ("device_blocks: 64", "device_blocks: 0", 8, "stages[1].kv.device_blocks: 0 is out of range"),
    ("host_blocks: 0", "host_blocks: -5", 8, "stages[1].kv.host_blocks: -5 is out of range"),
    ("stream_buffer: 0MB", "stream_buffer: -1MB", 8, "stages[1].stream_buffer: '-1MB' is not a size"),
    ("stream_from: 64", "stream_from: 8", 9, "stages[2].stream_from: 8 is out of range"),
    ("stream_buffer: 0MB", "stream_buffer: 9999TiB", 8, "stages[1].stream_buffer: 9999TiB is out of range"),
    ("threads: auto", "threads: 0", 9, "stages[2].threads: 0 is out of range"),
    ("threads: auto", "threads: many", 9, "stages[2].threads: 'many' is not a whole number"),
    ("memory: 4GiB", "memory: 4 gigs", 11, "devices.cuda:0.memory: '4 gigs' is not a size"),
    ("memory: 4GiB", "memory: 0", 11, "devices.cuda:0.memory: must be more than 0"),
    ("memory: 4GiB", "memory: 4", 11, "devices.cuda:0.memory: 4 is 4 B, too little for anything; write it with a unit"),
    ("memory: 4GiB", "memory: -4", 11, "devices.cuda:0.memory: -4 is out of range"),
    ("memory: 4GiB", "memory: 1.5", 11, "devices.cuda:0.memory: '1.5' is not a size"),
    ("memory: 4GiB", "memory: 1e999", 11, "devices.cuda:0.memory"),
    ("memory: 4GiB", "memory: .inf", 11, "devices.cuda:0.memory: '.inf' is not a size"),
    ("memory: 4GiB", "memory: ~", 11, "devices.cuda:0.memory: must be a size"),
    ("cpu: {memory: 8GiB}", "gpu: {memory: 8GiB}", 11, "devices.gpu: 'gpu' is not a device"),
    ("cpu: {memory: 8GiB}", "cpu: 8GiB", 11, "devices.cpu: must be a mapping, not '8GiB'"),
    ("cpu: {memory: 8GiB}", "? [cpu]\n : {memory: 8GiB}", 11, "devices: a key must be a word"),
    ("source: demo", "source: &a demo", 2, "anchors and aliases"),
    ("source: demo", "source: !!python/object/apply:os.system [ls]", 2, "the tag 'tag:yaml.org,2002:python/object"),
    ("source: demo", "source: !!str demo", 2, "the tag"),
    ("source: demo", "<<: demo", 2, "model: unknown key '<<'"),
    ("block_tokens: 64", "---\nblock_tokens: 64", 4, "a second document"),
    ("source: demo", "source: " + "[" * 40 + "]" * 40, 2, "nested more than 12 deep"),
    ("source: demo", 'source: "\\UFFFFFFFF"', 0, "not YAML"),
    ("source: demo", 'source: "\\uD800"', 2, "cannot be printed"),
    ("source: demo", "source: \x01", 0, "not YAML"),
    ("source: demo", "source: 'demo", 0, "not YAML"),
    ("version: 1", "\tversion: 1", 1, "not YAML"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "line", "why"), FAULTS, ids=[fault[1][:40] for fault in FAULTS])
def test_faults_name_file_line_and_key(tmp_path: Path, old: str, new: str, line: int, why: str) -> None:
    assert old in VALID
    with pytest.raises(InvalidPlacement) as refusal:
        load(tmp_path, VALID.replace(old, new, 1))
    message = str(refusal.value)
    assert why in message
    assert message.startswith(f"{tmp_path}/mine.yaml:{line}: " if line else f"{tmp_path}/mine.yaml:")
    assert "\n" not in message
    assert len(message) < 600


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "the file is empty; make one with: splitrun plan MODEL"),
        (b"# only a comment\n", "the file is empty"),
        (b"---\n...\n", "must be a mapping, not nothing"),
        (b"just words", "must be a mapping, not 'just words'"),
        (b"[1, 2]", "must be a mapping, not a list"),
        (b"version: 1\nmodel: \xff\xfe\n", "mine.yaml:2: not UTF-8 text"),
        (b"\xff\xfev\x00", "mine.yaml:1: not UTF-8 text"),
        (b"#" * ((1 << 20) + 1), "larger than 1 MiB"),
        (b"- " * 5000, "nested more than 12 deep"),
        (b"[" * 100_000, "nested more than 12 deep"),
        (b"{a: " * 5000, "nested more than 12 deep"),
        (b"- 1\n" * 60_000, "far too many entries"),
        (b"version: 1\nmodel: {source: demo}\nstages: []\n", "mine.yaml:3: stages: must list at least one stage"),
        (b"version: 1\nmodel: {source: demo}\nstages: {}\n", "mine.yaml:3: stages: must be a list, not a mapping"),
        (b"version: 1\nmodel: {source: demo}\nstages: [{device: cpu, units: [embed, head]}]\n", "stages[0].units"),
        (b"%YAML 1." + b"9" * 5000 + b"\n---\na: 1\n", "not YAML"),
        (b"a: &x [1]\nb: &y [*x, *x]\nc: [*y, *y]\n", "mine.yaml:1: anchors and aliases"),
    ],
    ids=lambda value: repr(value[:24]),
)
def test_files_that_are_no_placement(tmp_path: Path, content: bytes, why: str) -> None:
    with pytest.raises(InvalidPlacement) as refusal:
        load(tmp_path, content)
    assert why in str(refusal.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidPlacement, match="no such file; make one with: splitrun plan MODEL -o"):
        Placement.load(tmp_path / "absent.yaml")
    with pytest.raises(InvalidPlacement, match="cannot be read: Is a directory"):
        Placement.load(tmp_path)
    with pytest.raises(InvalidPlacement, match="cannot be read: embedded null"):
        Placement.load(str(tmp_path) + "/a\0b")


def only_invalid_placement(content: bytes) -> None:
    """Loads, or raises the one error; any other exception fails the test."""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(InvalidPlacement):
        load(Path(folder), content)


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace"))))
def test_fuzz_noise(content: bytes) -> None:
    only_invalid_placement(content)


PIECES = st.one_of(
    st.sampled_from(
        [*"{}[]:,-?&*!|>'\"%@`#\n\t ~<\\", "<<", "- ", ": ", "\\U", "0x", "1e9", ".nan", "null", "\0", "é"]
    ),
    st.text(max_size=4),
)


@settings(max_examples=250, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(VALID)), st.integers(0, 12), PIECES), min_size=1, max_size=4))
def test_fuzz_mutations_of_a_valid_file(changes: list[tuple[int, int, str]]) -> None:
    text = VALID
    for position, removed, inserted in changes:
        text = text[:position] + inserted + text[position + removed :]
    only_invalid_placement(text.encode("utf-8", "replace"))
