"""Prove that a model can be cut exactly, before anything of it is loaded.

A tiny twin of the model is cut into single units and run over KV blocks, with prompts in chunks, rows of different
lengths in one batch and windows shorter than the prompts; its logits must equal the unsplit twin's. There is no list
of architectures: what is disproved is refused, with the reason. The outcome is cached on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from splitrun.errors import SplitrunError, UnsupportedModel
from splitrun.folders import cache_folder
from splitrun.kernels.weight import install
from splitrun.model.cut import CutModel, CutRange
from splitrun.model.skeleton import quiet_transformers, require_decoder
from splitrun.model.structure import ModelStructure, inspect
from splitrun.model.twin import twin_config
from splitrun.schedule.request import SamplingParams
from splitrun.schedule.step import RowSampling, Step
from splitrun.stage.batch import Traits
from splitrun.stage.generic import RangeStage
from splitrun.stage.load import StageSize, load_stage

LENGTHS = (21, 13, 5)
NEW_TOKENS = 4
CHUNKS = (6, 11)
"""Shorter and longer than the twin's windows."""
BLOCK_TOKENS = 4
TOLERANCE = 5e-4
"""Largest difference of logits, relative to the largest logit (at least 1)."""


def prove(config: Any, folder: Path | None = None) -> Traits:
    """The traits of a model that can be cut; UnsupportedModel with the reason when it cannot.

    ``folder`` keeps outcomes; None is the user's cache.
    """
    require_decoder(config)
    try:
        twin = twin_config(config)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = str(error).split("\n")[0][:160]
        raise UnsupportedModel(f"{config.model_type}: no small twin can be made to prove the cut ({reason})") from error
    file = (folder or cache_folder() / "proofs") / f"{_key(twin)}.json"
    outcome = _read(file)
    if outcome is None:
        outcome = _outcome(twin)
        _write(file, outcome)
    if outcome.get("reason"):
        raise UnsupportedModel(f"{config.model_type} cannot be cut exactly: {outcome['reason']}")
    return Traits(one_by_one=outcome["one_by_one"] is True, equal_histories=outcome["equal_histories"] is True)


def _outcome(twin: Any) -> dict[str, Any]:
    try:
        reference = _reference(twin)
        structure = inspect(twin, "fp32")
        candidates = [Traits(), Traits(equal_histories=True)]
        if any(cache.states for cache in structure.caches):
            candidates.append(Traits(one_by_one=True))
        for traits in candidates:
            difference = _difference(twin, reference, structure, traits)
            if difference <= TOLERANCE:
                return asdict(traits)
        return {"reason": f"its cut twin differs from the unsplit one by {difference:.1e} of the largest logit"}
    except SplitrunError as error:
        return {"reason": str(error)}
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError) as error:
        return {"reason": f"its twin fails when cut: {type(error).__name__}: {str(error).splitlines()[0][:160]}"}


def _reference(twin: Any) -> Any:
    """The unsplit twin in float32, with no parameter at a neutral value."""
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(20)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(twin, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim < 2 else 1.5 / parameter.shape[-1] ** 0.5
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(parameter * 0.5 + noise if parameter.ndim < 2 else noise)
    return model


def _difference(twin: Any, reference: Any, structure: ModelStructure, traits: Traits) -> float:
    """Largest relative difference of logits over every step, cut into single units and whole."""
    count = structure.layers
    single = [CutRange(True, 0, 0, False)]
    single += [CutRange(False, index, index + 1, False) for index in range(count)]
    single += [CutRange(False, count, count, True)]
    middle = count // 2
    halves = [CutRange(True, 0, middle, False), CutRange(False, middle, count, True)]
    generator = torch.Generator().manual_seed(21)
    vocabulary = structure.vocabulary
    rows = [torch.randint(3, vocabulary, (n + NEW_TOKENS,), generator=generator).tolist() for n in LENGTHS]
    expected = [_unsplit_logits(reference, ids) for ids in rows]
    worst = 0.0
    whole = [CutRange(True, 0, count, True)]
    for cuts, chunk in ((single, CHUNKS[0]), (halves, CHUNKS[1]), (whole, CHUNKS[1])):
        stages = [_load(twin, reference, structure, cut, traits) for cut in cuts]
        for step, ends in _steps(rows, structure, chunk):
            logits = _run(stages, step)
            for row, (sequence, length) in ends.items():
                wanted = expected[sequence][length - 1]
                error = (logits[row] - wanted).abs().max() / wanted.abs().max().clamp(min=1.0)
                worst = max(worst, float(error) if torch.isfinite(error) else float("inf"))
    return worst


def _unsplit_logits(reference: Any, ids: list[int]) -> Tensor:
    with torch.inference_mode(), quiet_transformers():
        logits: Tensor = reference(torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def _load(twin: Any, reference: nn.Module, structure: ModelStructure, cut: CutRange, traits: Traits) -> RangeStage:
    def fill(model: CutModel) -> int:
        for name in model.own_names:
            module = reference.get_submodule(name.rpartition(".")[0])
            tensor = getattr(module, name.rpartition(".")[2])
            install(model.skeleton.model, name, tensor.detach().clone())
        return 0

    blocks = -(-(max(LENGTHS) + NEW_TOKENS) // BLOCK_TOKENS) * len(LENGTHS)
    pools = {group.name: blocks for group in structure.groups}
    size = StageSize("cpu", "fp32", "fp32", pools, BLOCK_TOKENS, len(LENGTHS))
    return load_stage(twin, structure, cut, size, fill, traits)


def _run(stages: list[RangeStage], step: Step) -> dict[int, Tensor]:
    activation: Tensor | None = None
    for stage in stages[:-1]:
        activation = stage.compute(step, activation).activation
    return stages[-1].compute(step, activation).logits


def _steps(
    rows: list[list[int]], structure: ModelStructure, chunk: int
) -> Iterator[tuple[Step, dict[int, tuple[int, int]]]]:
    """Prompts in chunks of ``chunk``, all sequences side by side, then tokens singly.

    Yields each step with its rows' (sequence, length after the step).
    """
    done = [0] * len(rows)
    per_row = -(-max(len(ids) for ids in rows) // BLOCK_TOKENS)
    index = 0
    while any(length < len(ids) for length, ids in zip(done, rows, strict=True)):
        members = [sequence for sequence, ids in enumerate(rows) if done[sequence] < len(ids)]
        counts = [min(chunk, LENGTHS[s] - done[s]) if done[s] < LENGTHS[s] else 1 for s in members]
        tables = numpy.array([[s * per_row + block for block in range(per_row)] for s in members], dtype=numpy.int32)
        ids = [rows[s][done[s] : done[s] + count] for s, count in zip(members, counts, strict=True)]
        step = Step(
            index=index,
            epoch=0,
            token_ids=numpy.array([token for part in ids for token in part], dtype=numpy.int32),
            query_starts=numpy.cumsum([0, *counts]).astype(numpy.int32),
            context_lengths=numpy.array([done[s] for s in members], dtype=numpy.int32),
            slots=numpy.array(members, dtype=numpy.int32),
            block_tables={group.name: tables for group in structure.groups if group.kind != "state"},
            sampling=tuple(RowSampling(SamplingParams(temperature=0), 0, done[s]) for s in members),
        )
        for s, count in zip(members, counts, strict=True):
            done[s] += count
        yield step, {row: (s, done[s]) for row, s in enumerate(members)}
        index += 1


def _key(twin: Any) -> str:
    import transformers

    from splitrun import __version__

    fields = {name: value for name, value in twin.to_dict().items() if not name.startswith("_")}
    text = json.dumps(fields, sort_keys=True, default=str)
    versions = f"{transformers.__version__} {torch.__version__} {__version__}"
    return hashlib.sha256(f"{versions} {TOLERANCE} {text}".encode()).hexdigest()[:32]


def _read(file: Path) -> dict[str, Any] | None:
    try:
        outcome = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(outcome, dict) or not ("reason" in outcome or asdict(Traits()).keys() <= outcome.keys()):
        return None
    return outcome


def _write(file: Path, outcome: dict[str, Any]) -> None:
    """Keep an outcome; a cache that cannot be written only costs the next start a second."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(outcome))
        temporary.replace(file)
    except OSError:
        return
