"""Random weights of the right names and shapes: ``--load dummy``, for measuring a model that is not downloaded.

Knows nothing of files.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from splitrun.kernels.formats import QUANTIZED
from splitrun.kernels.weight import Weight

PERIOD = 1 << 20
DEVIATION = 0.02


class DummySource:
    """Deterministic bf16 values per name and shape: normal with deviation 0.02; ones for vectors of a norm.

    A tensor repeats one period of random values, shifted by its name: making it costs a copy, not a draw.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = dict(shapes)
        generator = torch.Generator().manual_seed(0)
        self._values = (torch.randn(PERIOD + 1, generator=generator) * DEVIATION).to(torch.bfloat16)

    @classmethod
    def of(cls, model: nn.Module) -> DummySource:
        """For every parameter and persistent buffer of a skeleton, under the module's own names."""
        return cls({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})

    def names(self) -> tuple[str, ...]:
        """All tensor names."""
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the values."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Always bf16."""
        return torch.bfloat16

    def nbytes(self, name: str) -> int:
        """Bytes of the values."""
        return 2 * torch.Size(self._shapes[name]).numel()

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The values as a fresh tensor on the CPU; the same for the same name and shape in every process."""
        shape = self._shapes[name]
        first, last = 0, shape[0] if shape else 1
        if rows is not None:
            first, last, _ = rows.indices(shape[0])
        row = torch.Size(shape[1:]).numel()
        count = max(0, last - first) * row
        if len(shape) < 2 and "norm" in name.lower():
            return torch.ones(count, dtype=torch.bfloat16).view(shape if rows is None else (count,))
        values = torch.empty(count, dtype=torch.bfloat16)
        offset = (zlib.crc32(name.encode()) + first * row) % self._values.numel()
        done = 0
        while done < count:
            piece = self._values[offset : offset + count - done]
            values[done : done + piece.numel()] = piece
            done, offset = done + piece.numel(), 0
        return values.view(shape if rows is None else (max(0, last - first), *shape[1:]))

    def stored(self, name: str, dtype: torch.dtype) -> Weight | None:
        """None: dummy values are plain."""
        return None

    def stored_format(self, name: str) -> str | None:
        """None: dummy values are plain."""
        return None

    def place(self, name: str) -> str:
        """For messages."""
        return "dummy weights"


class RepeatedSource(DummySource):
    """Dummy values of which quantized ones are made once: the same tensor of another layer, or of the same model loaded
    again, is a copy. Quantizing takes tens of times as long.

    ``keep`` is to be given what was loaded, as `Loader.load` does.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], made: dict[str, Weight]) -> None:
        """``made``: what earlier loads kept, to which this one's is added. All must be of one format."""
        super().__init__(shapes)
        self._made = made

    def keep(self, name: str, value: Weight | Tensor) -> None:
        """Remember a value that can be copied."""
        if isinstance(value, Weight) and value.storage:
            self._made.setdefault(_any_layer(name), value)

    def nbytes(self, name: str) -> int:
        """Bytes of the values, or of the weight that they are copied from."""
        weight = self._alike(name)
        return super().nbytes(name) if weight is None else weight.nbytes

    def stored(self, name: str, dtype: torch.dtype) -> Weight | None:
        """A copy of the weight of that tensor that was made before; None: there is none."""
        weight = self._alike(name)
        if weight is None:
            return None
        other = QUANTIZED[weight.format].empty(weight.shape, weight.dtype, weight.device)
        for target, values in zip(other.storage, weight.storage, strict=True):
            target.copy_(values)
        return other

    def stored_format(self, name: str) -> str | None:
        """Format of that weight."""
        weight = self._alike(name)
        return None if weight is None else weight.format

    def _alike(self, name: str) -> Weight | None:
        weight = self._made.get(_any_layer(name))
        return weight if weight is not None and tuple(weight.shape) == self.shape(name) else None


def _any_layer(name: str) -> str:
    """The name without the numbers of layer and expert."""
    return re.sub(r"\.\d+\.", ".#.", name)
