"""Loads the stages of a placement that run in this process, and joins them to those that run elsewhere.

The same code loads in the coordinator and in a stage process. Knows the placement and the model's files, nothing of
requests.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from splitrun.cluster.process import machine_of
from splitrun.engine.exchange import COORDINATOR
from splitrun.engine.filling import Filling
from splitrun.engine.filling import Load as Load
from splitrun.engine.link import Link, RemoteLink
from splitrun.engine.pipeline import translated
from splitrun.errors import SplitrunError
from splitrun.kernels.gpu.library import or_compiler_errors, usable
from splitrun.measure.accelerators import half_type
from splitrun.measure.cache import Cache, cache_folder
from splitrun.measure.engine_cost import known_cost, with_engine
from splitrun.measure.host import worker_threads as share_of_processor
from splitrun.measure.probe import probe, this_machine
from splitrun.measure.thread_count import settle_threads
from splitrun.model.cut import CutRange
from splitrun.model.files import ModelFiles
from splitrun.model.read_ahead import drop_ahead
from splitrun.model.skeleton import DTYPES
from splitrun.model.structure import ModelStructure
from splitrun.model.weights import release_free_memory
from splitrun.planner.facts import VALUE_BYTES
from splitrun.planner.kv import pool_blocks
from splitrun.planner.memory import computes_layers, stage_dtype, streams
from splitrun.planner.placement import Placement, StageSpec
from splitrun.planner.relief import relief
from splitrun.schedule.step import Step
from splitrun.stage.batch import Traits
from splitrun.stage.generic import RangeStage
from splitrun.stage.load import StageSize, load_stage
from splitrun.transport.journal import Journal
from splitrun.transport.local import DeviceToHost, FromHost, Hop, Worker, hop, torch_device

if TYPE_CHECKING:
    from splitrun.stage.stream_card import StreamCard


def compute_dtype(device: str, weights: str) -> str:
    """The type a stage computes in: what the planner's facts would say, asked of torch."""
    kind, capability = device.split(":")[0], None
    if weights not in VALUE_BYTES and kind == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(torch.device(device))
    return stage_dtype(half_type(kind, capability), weights)


class StageLoading:
    """Loads the stages of ``placement``, one after the other."""

    def __init__(
        self,
        placement: Placement,
        files: ModelFiles,
        structure: ModelStructure,
        blocks: Mapping[str, int],
        load: Load,
        traits: Traits,
    ) -> None:
        self.placement = placement
        self._files = files
        self._structure = structure
        self._blocks = blocks
        self._traits = traits
        self._filling = Filling(files, structure, load)
        self._prompt_card: StreamCard | None = None

    def stage(self, index: int) -> RangeStage:
        """The stage of that index, loaded; runs on the stage's worker."""
        spec = self.placement.stages[index]
        dtype = compute_dtype(spec.device, spec.weights)
        size = StageSize(
            device=torch_device(spec.device),
            dtype=dtype,
            kv_dtype=spec.kv.dtype or dtype,
            blocks=self._blocks,
            block_tokens=self.placement.workload.block_tokens,
            slots=self.placement.workload.sessions,
        )
        cut = CutRange(spec.embed, spec.layers[0], spec.layers[1], spec.head)
        name = stage_name(spec)
        try:
            return load_stage(
                self._files.config,
                self._structure,
                cut,
                size,
                lambda model: self._filling.fill(model, spec.weights, name),
                self._traits,
                self._stream_card() if streams(spec, self.placement.workload) else None,
                spec.stream_from_tokens,
            )
        except SplitrunError:
            raise
        except or_compiler_errors(RuntimeError, MemoryError, OSError) as error:
            raise translated(error, name, relief(self.placement, spec.device)) from error

    def close(self) -> None:
        """Give back what stages share; for a load that failed."""
        if self._prompt_card is not None:
            self._prompt_card.close()

    def _stream_card(self) -> StreamCard | None:
        """The card of this process with slabs for the processor's weights; the processor's stages share it."""
        specs = [spec for spec in self.placement.stages if spec.stream_buffer_bytes and "/" not in spec.device]
        if not specs or not usable(specs[0].device):
            return None
        if self._prompt_card is None:
            from splitrun.stage.stream_card import StreamCard  # Triton is not everywhere

            self._prompt_card = StreamCard(torch.device(specs[0].device), specs[0].stream_buffer_bytes)
        return self._prompt_card


def stage_name(spec: StageSpec) -> str:
    """ "stage layers 0–5 on cuda:0", for messages."""
    return f"stage {spec.units_text} on {spec.device}"


def pool_sizes(placement: Placement, structure: ModelStructure) -> dict[str, int]:
    """Blocks per KV group: ids are shared by all stages, so the smallest pool decides."""
    return {
        group.name: min(pool_blocks(group, placement.workload, stage.kv.device_blocks) for stage in placement.stages)
        for group in structure.groups
        if group.kind != "state"
    }


def worker_threads(placement: Placement, device: str) -> int | None:
    """CPU threads of a worker: what its stages say, else its share of this machine; None elsewhere and on cards."""
    wanted = [stage.threads for stage in placement.stages if stage.device == device and stage.threads != "auto"]
    numbers = [count for count in wanted if isinstance(count, int)]
    if torch_device(device) != "cpu" or numbers:
        return max(numbers, default=None) if torch_device(device) == "cpu" else None
    return None if machine_of(device) else host_threads(device, cpu_workers(placement, device))


def cpu_workers(placement: Placement, device: str) -> int:
    """How many workers of the placement share the processor of ``device``'s machine."""
    here = machine_of(device)
    return sum(torch_device(name) == "cpu" and machine_of(name) == here for name in placement.device_names)


def host_threads(device: str, sharing: int) -> int | None:
    """Threads on this machine for one of ``sharing`` workers, as measuring has them; None on cards."""
    return share_of_processor(max(1, sharing)) if torch_device(device) == "cpu" else None


def _hold_budgets(placement: Placement, workers: Mapping[str, Worker]) -> None:
    """Hold torch's allocator on each CUDA device to its budget less the context that the driver already took."""
    for name, worker in workers.items():
        if name.startswith("cuda"):
            layers = any(computes_layers(stage) for stage in placement.stages if stage.device == name)
            worker.call(partial(_limit_allocator, name, placement.devices.get(name), layers))


def _limit_allocator(name: str, budget: int | None, layers: bool) -> None:
    """Set the limit of torch's allocator; without a budget, lift what an earlier engine may have left."""
    total = torch.cuda.mem_get_info(torch.device(name))[1]
    allowed = total if budget is None else max(0, budget - _context_bytes(name, layers))
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), torch.device(name))


def _context_bytes(name: str, layers: bool) -> int:
    """What the driver takes of a card: with all kernels loaded, where a plan of this machine has measured that."""
    cluster, kept = probe(compute=False), this_machine().cache
    known = next(filter(None, (known_cost(kept, card) for card in cluster.local_cards())), None)
    device = (with_engine(cluster, known) if known else cluster).device(name)
    return device.in_use(layers, beside_cpu=True).context_bytes  # the process is not the allocator's


@dataclass(frozen=True)
class LoadedStages:
    """The stages of this process by their index in the placement, and the worker of each device."""

    stages: Mapping[int, RangeStage]
    workers: Mapping[str, Worker]

    def memory_bytes(self, index: int) -> int:
        """Bytes of a stage's weights and KV."""
        return self.stages[index].weight_bytes + self.stages[index].kv_bytes

    def close(self) -> None:
        """Close the stages and end the workers; for stages that no pipeline runs."""
        for stage in self.stages.values():
            stage.close()
        for worker in self.workers.values():
            worker.close()


def load_stages(
    loading: StageLoading,
    placement: Placement,
    threads: Mapping[str, int | None],
    skip: Collection[int] = (),
    sharing: int | None = None,
) -> LoadedStages:
    """Load the stages whose devices are in ``threads`` (device -> CPU threads of its worker), less those to ``skip``.

    A worker that has the processor to itself may settle on another number of threads than that, where its stages leave
    it open; ``sharing``: how many workers share it, counted from the placement where it is not known otherwise. Nothing
    stays behind when one of them fails. Raises ModelError or DeviceOutOfMemory.
    """
    gc.collect()  # planning may have timed units: what it left goes before the weights come
    release_free_memory()
    with ExitStack() as undo:
        workers = {name: Worker(name, count) for name, count in threads.items()}
        undo.callback(loading.close)
        undo.callback(drop_ahead)
        for worker in workers.values():
            undo.callback(worker.close)
        _hold_budgets(placement, workers)
        stages = {
            index: workers[spec.device].call(partial(loading.stage, index))
            for index, spec in enumerate(placement.stages)
            if spec.device in workers and index not in skip
        }
        for name, worker in workers.items():
            given, own = threads[name], [index for index in stages if placement.stages[index].device == name]
            alone = (sharing or cpu_workers(placement, name)) == 1
            if given is not None and alone and all(placement.stages[index].threads == "auto" for index in own):
                settle = [stages[index] for index in own]
                worker.call(
                    partial(settle_threads, settle, placement.workload.block_tokens, given, Cache(cache_folder()))
                )
        undo.pop_all()
    drop_ahead()
    return LoadedStages(stages, workers)


def load_more(
    loading: StageLoading, placement: Placement, loaded: LoadedStages, indexes: Collection[int]
) -> LoadedStages:
    """Beside what is loaded, further stages of ``placement``, which ``loading`` loads from now on. When one of them
    fails, nothing of them stays behind, and those before are as they were. Raises ModelError or DeviceOutOfMemory."""
    loading.placement = placement
    workers = {name: worker for name, worker in loaded.workers.items() if worker.alive}
    names = {placement.stages[index].device for index in indexes} - workers.keys()
    stages: dict[int, RangeStage] = {}
    with ExitStack() as undo:
        fresh = {name: Worker(name, worker_threads(placement, name)) for name in sorted(names)}
        for worker in fresh.values():
            undo.callback(worker.close)
        _hold_budgets(placement, fresh)
        workers |= fresh
        for index in indexes:
            stages[index] = workers[placement.stages[index].device].call(partial(loading.stage, index))
            undo.callback(stages[index].close)
        undo.pop_all()
    drop_ahead()
    return LoadedStages({**loaded.stages, **stages}, workers)


def make_links(
    placement: Placement,
    loaded: LoadedStages,
    send: Callable[[int, Step, Tensor | None], None] | None,
    ring: Ring,
) -> list[Link | RemoteLink]:
    """Every stage in its place: those that are loaded here, and the others behind ``send`` (None: there are none)."""
    links: list[Link | RemoteLink] = []
    for index, spec in enumerate(placement.stages):
        name = stage_name(spec)
        stage = loaded.stages.get(index)
        following = placement.stages[index + 1].device if index + 1 < len(placement.stages) else None
        if following is not None and index + 1 not in loaded.stages:
            following = "cpu"
        if stage is not None:
            behind = loaded.stages.get(index + 1)
            reads_host = behind is not None and behind.reads_host
            onward = None if following is None else ring.hop(spec, following, reads_host)
            stage.gives_host = False
            if isinstance(onward, DeviceToHost) and ring.depth <= stage.most_left:
                stage.gives_host, onward.left = True, stage.left
            worker = loaded.workers[_worker_device(placement, index, loaded)]
            links.append(Link(stage, worker, name, onward, relief(placement, spec.device)))
        else:
            assert send is not None, f"{name} is not here"
            target = None if following is None else FromHost(torch_device(following))
            links.append(RemoteLink(name, partial(send, index), target))
    used = {id(link.worker) for link in links if isinstance(link, Link)}
    for worker in loaded.workers.values():
        if id(worker) not in used:
            worker.close()
    return links


def make_journals(placement: Placement, peers: Sequence[str], here: Collection[int]) -> dict[int, Journal]:
    """A journal in front of every stage of another process that may be lost, behind a stage that is here.

    ``peers``: who runs each stage; ``here``: the stages of this process.
    """
    workload = placement.workload
    return {
        index + 1: Journal(workload.sessions, workload.context)
        for index in here
        if index + 1 < len(peers) and index + 1 not in here and peers[index + 1] != COORDINATOR
    }


def _worker_device(placement: Placement, index: int, loaded: LoadedStages) -> str:
    """The device whose worker runs a stage: its own, but that of the next stage here for one that only embeds on the
    processor. Looking rows up takes less time than waking a thread."""
    spec = placement.stages[index]
    on_processor = torch_device(spec.device) == "cpu"
    only_embeds = on_processor and spec.embed and spec.layers[0] == spec.layers[1] and not spec.head
    return placement.stages[index + 1].device if only_embeds and index + 1 in loaded.stages else spec.device


@dataclass(frozen=True)
class Ring:
    """What the pinned buffers between devices must hold: steps in flight, rows of a step, and a row's width."""

    depth: int
    tokens: int
    hidden: int

    @classmethod
    def of(cls, placement: Placement, hidden: int, depth: int, chunk_tokens: int) -> Ring:
        """For the steps that the scheduler will make."""
        return cls(depth + 1, max(chunk_tokens, 16) + placement.workload.sessions, hidden)

    def hop(self, spec: StageSpec, target: str, reads_host: bool) -> Hop:
        """The way from a stage of this process to a device, whose stage may read pinned memory."""
        sizes = {"depth": self.depth, "tokens": self.tokens, "hidden": self.hidden}
        dtype = DTYPES[compute_dtype(spec.device, spec.weights)]
        return hop(spec.device, target, **sizes, dtype=dtype, reads_host=reads_host)
