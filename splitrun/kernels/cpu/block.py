"""Whole decoder layers in one call of the library: their weights, vectors, KV blocks and sizes.

Computes RMSNorm, grouped rotary attention over blocks with optional biases and query/key norms, and a gated SiLU MLP,
both with their residuals; in fp32 between the products, so it differs from torch's layer by rounding only. A token's
bits depend on that token and its history alone, for 1 to 16 tokens; more, a chunk of one prompt, have a kernel of their
own, whose bits are the same for the same chunk. Knows shapes and storage, neither models nor who made them.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from splitrun.kernels.cpu.dense import DenseWeight
from splitrun.kernels.cpu.library import DTYPES, MOST_ROWS, Kernel, Matrix
from splitrun.kernels.cpu.many import attention_rows, many_rows
from splitrun.kernels.cpu.tiled import TiledWeight

LANES = 16
MOST_WIDTH = 512
KV_DTYPES = {**DTYPES, torch.int8: 3}
MOST_GROUP_HEADS = 64
MATRICES = ("query", "key", "value", "output", "gate", "up", "down")
VECTORS = (
    *("query_bias", "key_bias", "value_bias", "output_bias"),
    *("first_norm", "second_norm", "query_norm", "key_norm"),
)


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, Matrix) for name in MATRICES),
        *((name, ctypes.c_void_p) for name in (*VECTORS, "keys", "values", "key_scales", "value_scales")),
        ("block_tokens", ctypes.c_int64),
        ("window", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("heads", "kv_heads", "width", "rotary", "dtype", "kv_dtype")),
        *((name, ctypes.c_float) for name in ("epsilon", "scale", "residual")),
    )


class _Rows(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tables", "table_starts", "skips", "lengths")),
        ("rows", ctypes.c_int64),
        ("count", ctypes.c_int64),
    )


@dataclass(frozen=True)
class LayerParts:
    """What a layer consists of.

    weights  MATRICES -> weight, all of one format and dtype
    vectors  VECTORS -> tensor of that dtype; absent: the layer has none
    keys, values  Shape: (blocks, KV heads, block tokens, width); int8 with ``kv_scales``, of each (blocks, KV heads,
             block tokens)
    window   tokens that a token sees, itself included; None: all
    scale    what scores are multiplied with
    rotary   how many of a head's values are rotated; None: all
    residual what attention and MLP are multiplied with before they are added
    """

    weights: Mapping[str, TiledWeight | DenseWeight]
    vectors: dict[str, Tensor]
    keys: Tensor
    values: Tensor
    window: int | None
    epsilon: float
    scale: float
    rotary: int | None = None
    residual: float = 1.0
    kv_scales: tuple[Tensor, Tensor] | None = None

    @property
    def rotated(self) -> int:
        """How many of a head's values are rotated: the width of cosines and sines."""
        return self.keys.shape[-1] if self.rotary is None else self.rotary

    def fault(self) -> str | None:
        """Why the kernel cannot run the layer, None when it can."""
        weights, width = self.weights, self.keys.shape[-1]
        query, key, value = (weights[name].shape[0] for name in ("query", "key", "value"))
        hidden = weights["query"].shape[1]
        heads = query // width
        inner = weights["gate"].shape[0]
        columns = {"output": query, "down": inner}
        rows = {"output": hidden, "down": hidden, "gate": inner, "up": inner}
        if self.keys.shape != self.values.shape or key != value or key != self.keys.shape[1] * width:
            return "keys and values differ in shape"
        if query % width or width % LANES or width > MOST_WIDTH or self.rotated % 2 or not 0 < self.rotated <= width:
            return f"heads are {width} wide, of which {self.rotated} are rotated"
        if heads % self.keys.shape[1] or heads // self.keys.shape[1] > MOST_GROUP_HEADS:
            return f"{heads} query heads do not share {self.keys.shape[1]} KV heads"
        if any(weight.shape[1] != columns.get(name, hidden) for name, weight in weights.items()):
            return "the matrices do not follow each other"
        if any(weights[name].shape[0] != count for name, count in rows.items()):
            return "the matrices do not follow each other"
        if len({(weight.format, weight.dtype) for weight in weights.values()}) != 1:
            return "the matrices have several formats"
        lengths = {"query_bias": query, "key_bias": key, "value_bias": value, "query_norm": width, "key_norm": width}
        for name, vector in self.vectors.items():
            if vector.dtype != weights["query"].dtype or tuple(vector.shape) != (lengths.get(name, hidden),):
                return f"{name} has another type or length"
        stored = (self.keys, self.values, *(self.kv_scales or ()))
        if (self.keys.dtype == torch.int8) != (self.kv_scales is not None):
            return "int8 keys and values go with scales"
        if self.keys.dtype not in KV_DTYPES or not all(tensor.is_contiguous() for tensor in stored):
            return "the KV blocks are stored otherwise"
        return None


class RowHistories:
    """Where the rows of a call read their history and write their new tokens.

    tables   per row: ids of the blocks that hold history and new tokens, in order
    skips    per row: slot of the history's first token in the first of them
    lengths  per row: tokens of history
    count    new tokens per row
    """

    def __init__(self, tables: Sequence[Sequence[int]], skips: Sequence[int], lengths: Sequence[int], count: int):
        self.tables, self.skips, self.lengths = tables, skips, lengths
        starts = [0]
        for table in tables:
            starts.append(starts[-1] + len(table))
        flat = [identifier for table in tables for identifier in table]
        self._memory = array("q", (*flat, *starts[:-1], *skips, *lengths))
        address, rows = self._memory.buffer_info()[0], len(tables)
        places = [address + 8 * (len(flat) + rows * index) for index in range(3)]
        self.structure = _Rows(address, *places, rows, count)
        self.tokens = rows * count


class BlockKernel:
    """One layer, ready to run. Keeps its parts alive; their tensors must not be replaced."""

    def __init__(self, parts: LayerParts, kernel: Kernel) -> None:
        """Raises ValueError for parts that have a `LayerParts.fault`."""
        fault = parts.fault()
        if fault is not None:
            raise ValueError(fault)
        self.parts = parts
        self.kernel = kernel
        width = parts.keys.shape[-1]
        query = parts.weights["query"]
        self.structure = _Block(
            *(parts.weights[name].matrix for name in MATRICES),
            *(parts.vectors[name].data_ptr() if name in parts.vectors else None for name in VECTORS),
            parts.keys.data_ptr(),
            parts.values.data_ptr(),
            *(scales.data_ptr() for scales in parts.kv_scales or ()),
            *(() if parts.kv_scales else (None, None)),
            parts.keys.shape[2],
            parts.window or 0,
            query.shape[0] // width,
            parts.keys.shape[1],
            width,
            parts.rotated,
            DTYPES[query.dtype],
            KV_DTYPES[parts.keys.dtype],
            parts.epsilon,
            parts.scale,
            parts.residual,
        )

    def takes_chunks(self) -> bool:
        """Whether more than 16 tokens can be computed in one call: in bf16, on processors with such a kernel."""
        parts = self.parts
        plain = parts.rotated == parts.keys.shape[-1] and parts.residual == 1.0
        quantized = all(isinstance(weight, TiledWeight) for weight in parts.weights.values())
        bf16 = parts.keys.dtype == parts.weights["query"].dtype == torch.bfloat16
        return plain and quantized and bf16 and many_rows() is not None and attention_rows() is not None

    def run_chunk(
        self, hidden: Tensor, cosines: Tensor, sines: Tensor, rows: RowHistories, out: Tensor | None = None
    ) -> Tensor:
        """The layer's output for a chunk of a prompt; only where `takes_chunks`. Writes the new keys and values, and
        ``out``, which may be ``hidden``.

        Shape: (tokens, hidden), twice (tokens, width) -> (tokens, hidden); contiguous, one dtype.
        """
        many, attention = many_rows(), attention_rows()
        assert many is not None, "asked for a chunk without `takes_chunks`"
        assert attention is not None
        out = torch.empty_like(hidden) if out is None else out
        structure, histories = ctypes.addressof(self.structure), ctypes.addressof(rows.structure)
        many.chunk(attention, structure, histories, hidden, cosines, sines, out)
        return out

    def joins(self, other: BlockKernel) -> bool:
        """Whether ``other`` can follow in the same call: same width, type and angles."""
        mine, theirs = self.parts.weights["query"], other.parts.weights["query"]
        same = mine.shape[1] == theirs.shape[1] and mine.dtype == theirs.dtype
        return same and self.parts.rotated == other.parts.rotated and self.kernel is other.kernel


class LayerChain:
    """Layers that run one after the other in one call; each `BlockKernel.joins` the one before it."""

    def __init__(self, blocks: Sequence[BlockKernel]) -> None:
        assert all(first.joins(second) for first, second in pairwise(blocks))
        self._blocks = tuple(blocks)
        self._addresses = _addresses([block.structure for block in blocks])

    def run(self, hidden: Tensor, cosines: Tensor, sines: Tensor, rows: Sequence[RowHistories]) -> Tensor:
        """The last layer's output. Writes the new keys and values into every layer's blocks.

        ``rows`` has one entry per layer, all for the same tokens. Shape: (tokens, hidden), twice (tokens, rotated
        width) -> (tokens, hidden); 1 to 16 tokens, contiguous, one dtype.
        """
        assert 1 <= rows[0].tokens <= MOST_ROWS
        assert len(rows) == len(self._blocks)
        out = torch.empty_like(hidden)
        histories = _addresses([histories.structure for histories in rows])
        self._blocks[0].kernel.layers(self._addresses, histories, hidden, cosines, sines, out)
        return out


def _addresses(structures: Sequence[ctypes.Structure]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(structures))(*map(ctypes.addressof, structures))
