"""Checkpoints that bitsandbytes has quantized already: loaded as they are, never quantized a second time.

4 bits: ``X.weight`` holds packed codes, beside it lie ``X.weight.absmax`` (fp32, or one byte through a second table:
``nested_absmax``, ``nested_quant_map``), ``X.weight.quant_map`` (the table of 16 values) and a JSON text
``X.weight.quant_state.bitsandbytes__nf4`` (or ``__fp4``) with shape and block length. 8 bits (LLM.int8): ``X.weight``
is int8, ``X.SCB`` the largest magnitude per row; a value is code x SCB / 127. Knows nothing of modules.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from splitrun.errors import CorruptWeights, UnsupportedModel
from splitrun.kernels.int8 import INVERSE_127, Int8Weight
from splitrun.kernels.nf4 import Nf4Weight
from splitrun.kernels.nf4_definition import dequantize_reference
from splitrun.kernels.weight import Weight
from splitrun.model.source import WeightSource

SIDES_4BIT = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
STATE = ".quant_state.bitsandbytes__"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class _State:
    """The JSON text of a 4-bit tensor."""

    shape: tuple[int, ...]
    block: int
    dtype: torch.dtype
    nested_block: int
    nested_offset: float


class QuantizedSource:
    """A source over another whose tensors bitsandbytes quantized; side tensors are not names of their own."""

    quantized = True

    def __init__(self, inner: WeightSource) -> None:
        self._inner = inner
        present = set(inner.names())
        self._states = {
            name.partition(STATE)[0]: name for name in present if STATE in name and name.partition(STATE)[0] in present
        }
        self._rows = {
            name.removesuffix("SCB") + "weight"
            for name in present
            if name.endswith(".SCB") and name.removesuffix("SCB") + "weight" in present
        }
        sides = {weight + side for weight in self._states for side in SIDES_4BIT} | set(self._states.values())
        sides |= {weight.removesuffix("weight") + side for weight in self._rows for side in ("SCB", "weight_format")}
        self._names = tuple(name for name in inner.names() if name not in sides)
        self._parsed: dict[str, _State] = {}

    def names(self) -> tuple[str, ...]:
        """Names of the values, without what describes their quantization."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the values."""
        return self._state(name).shape if name in self._states else self._inner.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Type of the values; of a quantized tensor, the type that `read` gives."""
        return torch.float32 if name in self._states or name in self._rows else self._inner.dtype(name)

    def nbytes(self, name: str) -> int:
        """Bytes as a quantized weight: codes with fp32 maxima or scales."""
        if name in self._states:
            state = self._state(name)
            values = math.prod(state.shape)
            if not self._aligned(name):
                return values * state.dtype.itemsize
            return values // 2 + 4 * (values // state.block) + (0 if self._is_nf4(name) else 64)
        if name in self._rows:
            return Int8Weight.stored_bytes(self.shape(name))
        return self._inner.nbytes(name)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The values, dequantized to fp32 where they are quantized."""
        if self.stored_format(name) is None:
            if name in self._states:
                return self._flat(name)[rows or slice(None)]
            return self._inner.read(name, rows)
        weight = self.stored(name, torch.float32)
        assert weight is not None
        if rows is None:
            return weight.dequantize()
        start, stop, _ = rows.indices(weight.shape[0])
        return weight.part(start, max(start, stop)).dequantize()

    def stored(self, name: str, dtype: torch.dtype) -> Weight | None:
        """The quantized tensor as it is, for computing in ``dtype``; None for a plain one."""
        kind = self.stored_format(name)
        if kind == "nf4":
            state = self._state(name)
            *leading, width = state.shape
            packed = self._packed(name).view(*leading, width // 2)
            maxima = self._maxima(name, state).view(*leading, width // state.block)
            table = None if self._is_nf4(name) else self._inner.read(name + ".quant_map").float()
            return Nf4Weight(packed, maxima, dtype, table)
        if kind == "int8":
            scales = self._inner.read(name.removesuffix("weight") + "SCB").float().view(-1)
            self._finite(name, scales)
            return Int8Weight(self._inner.read(name), scales * INVERSE_127, dtype)
        return None

    def stored_format(self, name: str) -> str | None:
        """ "nf4" (any table of 4 bits), "int8", or None: a plain tensor, or one whose blocks cross rows."""
        if name in self._rows:
            return "int8"
        return "nf4" if name in self._states and self._aligned(name) else None

    def place(self, name: str) -> str:
        """Where the tensor lies."""
        return self._inner.place(name)

    def _is_nf4(self, name: str) -> bool:
        return self._states[name].endswith("nf4")

    def _aligned(self, name: str) -> bool:
        state = self._state(name)
        return state.shape[-1] % state.block == 0

    def _state(self, name: str) -> _State:
        if name not in self._parsed:
            raw = bytes(self._inner.read(self._states[name]).tolist())
            try:
                self._parsed[name] = _parse_state(json.loads(raw))
            except (ValueError, KeyError, TypeError) as error:
                raise CorruptWeights(
                    f"{self._states[name]} in {self.place(name)} is not a quantization state"
                ) from error
            state = self._parsed[name]
            if math.prod(state.shape) != 2 * self._inner.nbytes(name):
                raise CorruptWeights(
                    f"{name} in {self.place(name)} does not hold the {list(state.shape)} values it claims"
                )
        return self._parsed[name]

    def _packed(self, name: str) -> Tensor:
        return self._inner.read(name).view(-1).view(torch.uint8)

    def _maxima(self, name: str, state: _State) -> Tensor:
        maxima = self._inner.read(name + ".absmax")
        if maxima.dtype == torch.uint8:
            table = self._inner.read(name + ".nested_quant_map").float()
            outer = self._inner.read(name + ".nested_absmax").float()
            scales = outer.repeat_interleave(state.nested_block)[: maxima.numel()]
            maxima = table[maxima.int()] * scales + state.nested_offset
        self._finite(name, maxima)
        return maxima.float()

    def _flat(self, name: str) -> Tensor:
        """Values of a tensor whose blocks cross rows, in the type that it was quantized from."""
        state = self._state(name)
        packed, maxima = self._packed(name), self._maxima(name, state)
        table = self._inner.read(name + ".quant_map").float()
        padding = -packed.numel() * 2 % state.block // 2
        packed = torch.nn.functional.pad(packed, (0, padding))
        values = dequantize_reference(packed, maxima, table, torch.float32)
        return values[: math.prod(state.shape)].view(state.shape)

    def _finite(self, name: str, scales: Tensor) -> None:
        if not bool(torch.isfinite(scales).all()):
            raise CorruptWeights(f"{name} in {self.place(name)} has scales that are NaN or infinite: download it again")


def _parse_state(fields: dict[str, Any]) -> _State:
    state = _State(
        shape=tuple(int(length) for length in fields["shape"]),
        block=int(fields["blocksize"]),
        dtype=DTYPES[str(fields["dtype"]).removeprefix("torch.")],
        nested_block=int(fields.get("nested_blocksize") or 1),
        nested_offset=float(fields.get("nested_offset") or 0.0),
    )
    if min(state.block, state.nested_block, len(state.shape), *state.shape) < 1:
        raise ValueError("a length is below 1")
    return state


def with_quantization(source: WeightSource, quantization: Any) -> WeightSource:
    """The source as its config's ``quantization_config`` (a mapping or object, or None) says that it is stored.

    Raises UnsupportedModel for methods other than bitsandbytes.
    """
    if quantization is None:
        return source
    fields = quantization if isinstance(quantization, dict) else dict(vars(quantization))
    bits = [bits for bits in ("4", "8") if fields.get(f"load_in_{bits}bit") or fields.get(f"_load_in_{bits}bit")]
    method = str(getattr(fields.get("quant_method"), "value", fields.get("quant_method") or "bitsandbytes"))
    if not method.startswith("bitsandbytes") or not bits:
        raise UnsupportedModel(
            f"the checkpoint is quantized with {method}, which splitrun does not read: take the unquantized one "
            "(splitrun quantizes to nf4 or int8 while loading) or one made with bitsandbytes"
        )
    return QuantizedSource(source)
