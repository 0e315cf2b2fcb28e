"""Fills the stages of this process with their weights: from the packed ones of an earlier load, else from the files.

Tensors that a device holds already in the same format (tied ones, of another stage) are shared. Knows the model's
files, not the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Literal

from torch import Tensor

from splitrun.kernels.cpu.arena import ARENA
from splitrun.kernels.formats import QUANTIZED
from splitrun.kernels.weight import Weight, install
from splitrun.model.cut import CutModel
from splitrun.model.dummy import DummySource
from splitrun.model.files import ModelFiles
from splitrun.model.packed import PackedWeights, packed_weights
from splitrun.model.structure import ModelStructure
from splitrun.model.weights import Loader

Load = Literal["weights", "dummy"]


class Filling:
    """Fills cut models one after the other; remembers tied tensors per device and format."""

    def __init__(self, files: ModelFiles, structure: ModelStructure, load: Load) -> None:
        self._files = files
        self._structure = structure
        self._dummy = load == "dummy"
        self._taken: list[list[str]] = []
        self._held: dict[tuple[str, str, str], Weight | Tensor] = {}

    def fill(self, model: CutModel, weights: str, stage: str) -> int:
        """Install the model's own tensors in the format; the bytes that they take beside what is there already.

        ``stage`` names the place in messages. Raises ModelError, or what torch raises on a device without room.
        """
        packed = self._packed(model, weights)
        ready = [own for own in model.own_names if packed is not None and packed.has([own])]
        missing = [own for own in model.own_names if own not in set(ready)]
        loader = self._loader(model) if missing or packed is None else None
        ties = self._ties(loader, packed)
        device = str(model.device)
        keys = {own: (device, weights, ties.get(own, own)) for own in model.own_names}
        shared = {own: self._held[key] for own, key in keys.items() if key in self._held}
        nbytes = 0
        if packed is not None and ready:
            found = packed.fill(model.skeleton.model, [own for own in ready if own not in shared], self._taken)
            missing = missing if found is not None else list(model.own_names)
            nbytes += found or 0
        wanted = [own for own in missing if own not in shared]
        if wanted:
            nbytes += self._load(model, loader or self._loader(model), wanted, weights, stage, packed)
        for own, value in shared.items():
            install(model.skeleton.model, own, value)
        sources = set(ties.values())
        for own, key in keys.items():
            if key[2] in sources and own not in shared:
                module = model.skeleton.model.get_submodule(own.rpartition(".")[0])
                self._held[key] = getattr(module, own.rpartition(".")[2])
        return nbytes

    def _load(
        self, model: CutModel, loader: Loader, names: list[str], weights: str, stage: str, packed: PackedWeights | None
    ) -> int:
        """Load from the checkpoint, and keep what is packed on the way."""
        units = {info.name: info.unit for info in self._structure.parameters}
        layers = self._structure.layers

        def where(own: str) -> str:
            unit = units.get(own, 0)
            return f"{stage}, {'embedding' if unit == 0 else 'head' if unit > layers else f'layer {unit - 1}'}"

        nbytes = loader.nbytes(names, weights)
        writer = None if packed is None else packed.writer(nbytes)
        keep: Callable[[str, Weight | Tensor], None] = _keep_nothing
        with ExitStack() as writing:
            if model.device.type == "cpu" and weights in QUANTIZED:
                writing.enter_context(ARENA.reserved(nbytes))
            if writer is not None:
                writing.enter_context(writer)
                writer.tied(loader.map.ties, [own for own in model.own_names if own not in loader.map.recipes])
                keep = writer.keep
            return loader.load(names, weights, model.device, where, keep).nbytes

    def _loader(self, model: CutModel) -> Loader:
        skeleton = model.skeleton.model
        return Loader(skeleton, DummySource.of(skeleton) if self._dummy else self._files.source, model.dtype)

    def _packed(self, model: CutModel, weights: str) -> PackedWeights | None:
        files = self._files
        if self._dummy or getattr(files.source, "quantized", False):
            return None
        return packed_weights(files.path, files.fingerprint, files.name, weights, model.dtype, model.device)

    def _ties(self, loader: Loader | None, packed: PackedWeights | None) -> Mapping[str, str]:
        """What shares a tensor: what the checkpoint ties; among dummy weights, what the config does."""
        if self._dummy:
            return {info.name: info.tied_to for info in self._structure.parameters if info.tied_to}
        if loader is not None:
            return loader.map.ties
        return {} if packed is None else packed.ties


def _keep_nothing(name: str, value: Weight | Tensor) -> None:
    """Where no packed copy is written."""
