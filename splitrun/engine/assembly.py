"""From a placement to a running engine core: workers, stages, hops, scheduler.

The only place that joins the plan's numbers to the model's files. Nothing is loaded before the plan is known to suit
the model and the model is known to be cut exactly.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Literal

import torch
import yaml
from torch import Tensor

from splitrun.engine.core import EngineCore
from splitrun.engine.interface import StageStatus
from splitrun.engine.pipeline import Link, Pipeline, translated
from splitrun.errors import InvalidPlacement, SplitrunError
from splitrun.kernels.weight import Weight, install
from splitrun.measure.host import read_processor
from splitrun.measure.probe import probe
from splitrun.model.cut import CutModel, CutRange
from splitrun.model.dummy import DummySource
from splitrun.model.files import ModelFiles
from splitrun.model.skeleton import DTYPES, exact_context
from splitrun.model.source import WeightSource
from splitrun.model.structure import ModelStructure, inspect
from splitrun.model.weights import Loader
from splitrun.planner.facts import VALUE_BYTES
from splitrun.planner.kv import pool_blocks
from splitrun.planner.placement import Placement, StageSpec
from splitrun.planner.placement_file import dump
from splitrun.schedule.scheduler import GroupSpec, Limits, Scheduler
from splitrun.stage.generic import GenericStage
from splitrun.stage.load import StageSize, load_stage
from splitrun.stage.proof import prove
from splitrun.transport.local import Worker, hop, torch_device

Load = Literal["weights", "dummy"]


def compute_dtype(device: str, weights: str) -> str:
    """The type a stage computes in: a dense format's own; for int8 and nf4 bf16, or fp16 where bf16 is emulated."""
    if weights in VALUE_BYTES:
        return weights
    kind = device.split(":")[0]
    if kind == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(torch.device(device)) < (8, 0):
        return "fp16"
    return "fp16" if kind == "mps" else "bf16"


def assemble(
    placement: Placement, files: ModelFiles, *, load: Load, depth: int | None, chunk_tokens: int
) -> EngineCore:
    """A running engine core for the placement, warmed up by one real token.

    ``load`` "dummy" makes random weights instead of reading them. ``depth`` is the number of steps in flight, by
    default one per worker. Raises InvalidPlacement when the plan is stale, ModelError when the model cannot be cut or
    loaded, DeviceOutOfMemory when a device is too small after all.
    """
    for spec in placement.stages:
        _require_possible(spec)
    if load == "weights":
        _require_same_model(placement, files)
    traits = prove(files.config)
    structure = inspect(files.config)
    _require_suitable(placement, files, structure)
    blocks = _pool_sizes(placement, structure)
    depth = depth or len(placement.device_names)
    scheduler = _scheduler(placement, structure, blocks, depth, chunk_tokens)
    with ExitStack() as undo:
        workers = {name: Worker(name, _threads(placement, name)) for name in placement.device_names}
        for worker in workers.values():
            undo.callback(worker.close)
        _hold_budgets(placement, workers)
        loading = _Loading(placement, files, structure, blocks, load, one_by_one=traits.one_by_one)
        stages = [
            workers[spec.device].call(partial(loading.stage, index)) for index, spec in enumerate(placement.stages)
        ]
        links = _links(placement, stages, workers, structure.hidden, depth, chunk_tokens)
        statuses = tuple(
            StageStatus(spec.device, spec.units_text, stage.weight_bytes + stage.kv_bytes)
            for spec, stage in zip(placement.stages, stages, strict=True)
        )
        core = EngineCore(scheduler, partial(Pipeline, links), statuses, yaml.safe_load(dump(placement)))
        undo.pop_all()
        undo.callback(core.close)
        core.warm_up()
        undo.pop_all()
    return core


def _require_same_model(placement: Placement, files: ModelFiles) -> None:
    """Raise InvalidPlacement when the files are not those that were planned."""
    if placement.model.fingerprint not in (None, files.fingerprint):
        raise InvalidPlacement(
            f"{placement.model.source} changed since it was planned: plan again with "
            f"splitrun plan {placement.model.source} --context {placement.workload.context} -o FILE"
        )


def _require_suitable(placement: Placement, files: ModelFiles, structure: ModelStructure) -> None:
    """Raise InvalidPlacement when layers or context do not suit the model."""
    source = placement.model.source
    if placement.layers != structure.layers:
        raise InvalidPlacement(f"the placement splits {placement.layers} layers, but {source} has {structure.layers}")
    longest = exact_context(files.config)
    if longest is not None and placement.workload.context > longest:
        raise InvalidPlacement(
            f"{source} changes its rotary table beyond {longest} tokens, which splitrun cannot do "
            f"without losing exactness: plan again with --context {longest}"
        )


def _scheduler(
    placement: Placement, structure: ModelStructure, blocks: Mapping[str, int], depth: int, chunk_tokens: int
) -> Scheduler:
    limits = Limits(
        context=placement.workload.context,
        sessions=placement.workload.sessions,
        vocabulary=structure.vocabulary,
        chunk_tokens=chunk_tokens,
        block_tokens=placement.workload.block_tokens,
        depth=depth,
    )
    paged = [group for group in structure.groups if group.kind != "state"]
    return Scheduler(tuple(GroupSpec(group.name, group.window, blocks[group.name]) for group in paged), limits)


class _Loading:
    """Loads the stages of one placement, one after the other; remembers tied tensors per device and format."""

    def __init__(
        self,
        placement: Placement,
        files: ModelFiles,
        structure: ModelStructure,
        blocks: Mapping[str, int],
        load: Load,
        *,
        one_by_one: bool,
    ) -> None:
        self._placement = placement
        self._files = files
        self._structure = structure
        self._blocks = blocks
        self._one_by_one = one_by_one
        self._source: WeightSource | None = files.source if load == "weights" else None
        self._tied: dict[tuple[str, str, str], Weight | Tensor] = {}

    def stage(self, index: int) -> GenericStage:
        """The stage of that index, loaded; runs on the stage's worker."""
        spec = self._placement.stages[index]
        dtype = compute_dtype(spec.device, spec.weights)
        size = StageSize(
            device=torch_device(spec.device),
            dtype=dtype,
            kv_dtype=spec.kv.dtype or dtype,
            blocks=self._blocks,
            block_tokens=self._placement.workload.block_tokens,
            slots=self._placement.workload.sessions,
        )
        cut = CutRange(spec.embed, spec.layers[0], spec.layers[1], spec.head)
        name = stage_name(spec)
        try:
            return load_stage(
                self._files.config,
                self._structure,
                cut,
                size,
                lambda model: self._fill(model, spec, name),
                one_by_one=self._one_by_one,
            )
        except SplitrunError:
            raise
        except (RuntimeError, MemoryError, OSError) as error:
            raise translated(error, name) from error

    def _fill(self, model: CutModel, spec: StageSpec, name: str) -> int:
        """Load a stage's own tensors; a tied one that this device already holds in this format is shared."""
        skeleton = model.skeleton.model
        source = self._source or DummySource.of(skeleton)
        loader = Loader(skeleton, source, model.dtype)
        device = torch_device(spec.device)
        ties = {info.name: info.tied_to or info.name for info in self._structure.parameters}
        keys = {own: (device, spec.weights, loader.map.ties.get(own, ties[own])) for own in model.own_names}
        shared = {own: self._tied[key] for own, key in keys.items() if key in self._tied}
        units = {info.name: info.unit for info in self._structure.parameters}
        loaded = loader.load(
            [own for own in model.own_names if own not in shared],
            spec.weights,
            device,
            lambda own: f"{name}, {_unit_text(units.get(own, 0), self._structure.layers)}",
        )
        for own, value in shared.items():
            install(skeleton, own, value)
        sources = {info.tied_to for info in self._structure.parameters if info.tied_to} | set(loader.map.ties.values())
        for own, key in keys.items():
            if key[2] in sources and own not in shared:
                module = skeleton.get_submodule(own.rpartition(".")[0])
                self._tied[key] = getattr(module, own.rpartition(".")[2])
        return loaded.nbytes


def stage_name(spec: StageSpec) -> str:
    """ "stage layers 0–5 on cuda:0", for messages."""
    return f"stage {spec.units_text} on {spec.device}"


def _unit_text(unit: int, layers: int) -> str:
    return "embedding" if unit == 0 else "head" if unit > layers else f"layer {unit - 1}"


def _require_possible(spec: StageSpec) -> None:
    """Refuse what this machine or this version cannot do. Raises InvalidPlacement."""
    kind, _, number = spec.device.partition(":")
    counts = {
        "cpu": 1 << 16,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "xpu": torch.xpu.device_count() if torch.xpu.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }
    if "/" in kind:
        raise InvalidPlacement(f"{stage_name(spec)}: this version runs on one machine; plan again without --nodes")
    if int(number or 0) >= counts[kind]:
        raise InvalidPlacement(
            f"{stage_name(spec)}: there is no such device here; `splitrun doctor` lists those there are"
        )
    unused = {
        "kv.host_blocks": spec.kv.host_blocks,
        "kv.disk_blocks": spec.kv.disk_blocks,
        "stream_buffer": spec.stream_buffer_bytes,
    }
    for key, value in unused.items():
        if value:
            raise InvalidPlacement(f"{stage_name(spec)}: {key} {value} is not supported by this version: set it to 0")


def _pool_sizes(placement: Placement, structure: ModelStructure) -> dict[str, int]:
    """Blocks per KV group: ids are shared by all stages, so the smallest pool decides."""
    return {
        group.name: min(pool_blocks(group, placement.workload, stage.kv.device_blocks) for stage in placement.stages)
        for group in structure.groups
        if group.kind != "state"
    }


def _threads(placement: Placement, device: str) -> int | None:
    """CPU threads of a worker: what its stages say, else OMP_NUM_THREADS or the cores, shared by the virtual CPUs."""
    if torch_device(device) != "cpu":
        return None
    wanted = [stage.threads for stage in placement.stages if stage.device == device and stage.threads != "auto"]
    numbers = [count for count in wanted if isinstance(count, int)]
    if numbers:
        return max(numbers)
    hosts = sum(torch_device(name) == "cpu" for name in placement.device_names)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    cores = read_processor().cores
    return max(1, (min(cores, int(asked)) if asked.isdecimal() and int(asked) else cores) // hosts)


def _hold_budgets(placement: Placement, workers: Mapping[str, Worker]) -> None:
    """Hold torch's allocator on each CUDA device to its budget less the context that the driver already took."""
    for name, worker in workers.items():
        budget = placement.devices.get(name)
        if budget is not None and name.startswith("cuda"):
            worker.call(partial(_limit_allocator, name, budget))


def _limit_allocator(name: str, budget: int) -> None:
    total = torch.cuda.mem_get_info(torch.device(name))[1]
    allowed = max(0, budget - probe().device(name).context_bytes)
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), torch.device(name))


def _links(
    placement: Placement,
    stages: list[GenericStage],
    workers: Mapping[str, Worker],
    hidden: int,
    depth: int,
    chunk_tokens: int,
) -> list[Link]:
    tokens = max(chunk_tokens, 16) + placement.workload.sessions
    links = []
    for index, (spec, stage) in enumerate(zip(placement.stages, stages, strict=True)):
        onward = None
        if index + 1 < len(stages):
            dtype = DTYPES[compute_dtype(spec.device, spec.weights)]
            target = placement.stages[index + 1].device
            onward = hop(spec.device, target, depth=depth + 1, tokens=tokens, hidden=hidden, dtype=dtype)
        links.append(Link(stage, workers[spec.device], stage_name(spec), onward))
    return links
