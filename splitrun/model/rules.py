"""Per parameter of a skeleton: is it covered by quantized formats, and which type does it have when it is not.

The one place where planning and loading get this from, so that promised and real bytes agree. Knows nothing of files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from splitrun.kernels.formats import applied_format, covered, weight_bytes

EXPERT_COUNTS = (
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    *("num_routed_experts", "num_moe_experts", "n_experts"),
)
"""Names under which configs hold their number of experts."""


class TensorRules:
    """What becomes of each parameter and persistent buffer of a model when it is loaded.

    Made from a skeleton before anything is installed in it. ``compute_dtype`` is the type that the model computes in.
    """

    def __init__(self, model: Any, compute_dtype: torch.dtype) -> None:
        self.compute_dtype = compute_dtype
        tensors = dict(_tensors(model))
        types = Counter(tensor.dtype for name, (_, _, tensor) in tensors.items() if tensor.is_floating_point())
        common = types.most_common(1)[0][0] if types else compute_dtype
        kept = _kept_in_fp32(model, compute_dtype)
        experts = expert_counts(model.config)
        tokens = model.get_input_embeddings()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.buffers: set[str] = set()
        self._dtypes: dict[str, torch.dtype] = {}
        self._covered: set[str] = set()
        for name, (module, attribute, tensor) in tensors.items():
            self.shapes[name] = tuple(tensor.shape)
            buffer = attribute in module._buffers
            if buffer:
                self.buffers.add(name)
            if tensor.is_floating_point() and kept(name):
                self._dtypes[name] = torch.float32
            elif buffer or tensor.dtype != common:
                self._dtypes[name] = tensor.dtype
            else:
                self._dtypes[name] = compute_dtype
                if covered(module, attribute, tensor, experts, tokens):
                    self._covered.add(name)

    def covers(self, name: str) -> bool:
        """Whether quantized formats apply to this parameter (nf4 only where its rows divide into blocks)."""
        return name in self._covered

    def dtype(self, name: str) -> torch.dtype:
        """Type of the tensor when it is not quantized: the compute dtype but for what must stay more precise."""
        return self._dtypes[name]

    def format(self, name: str, weight_format: str) -> str | None:
        """The quantized format that this parameter gets in a stage of ``weight_format``; None: a plain tensor."""
        return applied_format(self.shapes[name], weight_format, self.covers(name))

    def nbytes(self, names: Iterable[str], weight_format: str) -> int:
        """Exact bytes of these parameters when loaded from an unquantized checkpoint, each name counted."""
        return sum(
            weight_bytes(self.shapes[name], self.format(name, weight_format) or "dense", self.dtype(name))
            for name in names
        )


def expert_counts(config: Any) -> frozenset[int]:
    """Numbers of experts that a config names; empty for a dense model."""
    text = config.get_text_config(decoder=True)
    counts: set[int] = set()
    for name in EXPERT_COUNTS:
        value = getattr(text, name, None)
        values = value if isinstance(value, list | tuple) else [value]
        counts.update(count for count in values if isinstance(count, int) and count > 1)
    return frozenset(counts)


def _kept_in_fp32(model: Any, compute_dtype: torch.dtype) -> Any:
    patterns = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(compute_dtype)]
    if not patterns:
        return lambda name: False
    expression = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
    return lambda name: expression.search(name) is not None


def _tensors(model: nn.Module) -> Iterable[tuple[str, tuple[nn.Module, str, Tensor]]]:
    """Parameters and persistent buffers, shared ones under each of their names."""
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for attribute, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None and attribute not in module._non_persistent_buffers_set:
                yield prefix + attribute, (module, attribute, tensor)
