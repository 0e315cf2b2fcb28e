"""The common decoder layer on a GPU: RMSNorm, rotary grouped attention over KV blocks, gated MLP, residuals.

Two ways through it: few rows with one new token each (a constant number of launches, no allocation, fit for a graph),
and prompts, whose products are torch's on written-out values. Both write the same keys and values. Knows no models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from splitrun.kernels.gpu.attention import DecodeAttention, prompt_attention
from splitrun.kernels.gpu.matrix import GpuMatrix
from splitrun.kernels.gpu.products import ROWS, Products
from splitrun.kernels.gpu.rows import gate, norm, place
from splitrun.kernels.gpu.shapes import Heads, History
from splitrun.kernels.gpu.unpack import PromptProducts


@dataclass(frozen=True)
class LayerWeights:
    """What a layer multiplies with.

    projections  queries, keys and values below each other; gates: gates and ups below each other
    first_norm, second_norm  before attention and MLP. Shape: (hidden,)
    """

    projections: GpuMatrix
    output: GpuMatrix
    gates: GpuMatrix
    down: GpuMatrix
    first_norm: Tensor
    second_norm: Tensor
    projection_bias: Tensor | None
    output_bias: Tensor | None
    epsilon: float


@dataclass(frozen=True)
class Turns:
    """Cosines and sines of the tokens' positions. Shape: fp32 (tokens, width), both halves alike."""

    cosines: Tensor
    sines: Tensor


class DecodeMemory:
    """What decoding layers of the same shapes write between their kernels, for up to 16 rows."""

    def __init__(self, weights: LayerWeights, heads: Heads, products: Products, dtype: torch.dtype) -> None:
        device = heads.keys.device
        self.products = products
        self.attention = DecodeAttention(heads, ROWS, device)
        hidden, wide = weights.output.rows, weights.down.columns
        self.normed, self.gated = (torch.zeros((ROWS, width), dtype=dtype, device=device) for width in (hidden, wide))
        self.projected = torch.zeros((ROWS, weights.projections.rows), dtype=dtype, device=device)
        self.context = torch.zeros((ROWS, weights.output.columns), dtype=dtype, device=device)


class GpuLayer:
    """One layer; ``heads`` has its KV blocks."""

    def __init__(self, weights: LayerWeights, heads: Heads) -> None:
        self.weights = weights
        self.heads = heads

    def decode(self, hidden: Tensor, memory: DecodeMemory, history: History, turns: Turns) -> None:
        """One new token per row, in place. Shape: hidden (rows, hidden), up to 16 rows. Writes KV blocks."""
        rows, weights, products = hidden.shape[0], self.weights, memory.products
        normed, projected, context, gated = (
            buffer[:rows] for buffer in (memory.normed, memory.projected, memory.context, memory.gated)
        )
        norm(hidden, weights.first_norm, weights.epsilon, normed)
        products(normed, weights.projections, projected, bias=weights.projection_bias)
        memory.attention(projected, self.heads, history, turns.cosines, turns.sines, context)
        products(context, weights.output, hidden, bias=weights.output_bias, residual=hidden)
        norm(hidden, weights.second_norm, weights.epsilon, normed)
        products(normed, weights.gates, gated, gated=True)
        products(gated, weights.down, hidden, residual=hidden)

    def prompt(self, hidden: Tensor, products: PromptProducts, history: History, turns: Turns) -> Tensor:
        """Many new tokens per row. Shape: (tokens, hidden) -> the same, a fresh tensor. Writes KV blocks."""
        tokens, weights = hidden.shape[0], self.weights
        normed = norm(hidden, weights.first_norm, weights.epsilon, torch.empty_like(hidden))
        projected = hidden.new_empty((tokens, weights.projections.rows))
        products(normed, weights.projections, projected, bias=weights.projection_bias)
        place(projected, self.heads, history, turns.cosines, turns.sines)
        context = prompt_attention(projected, self.heads, history, hidden.new_empty((tokens, weights.output.columns)))
        attended = products(context, weights.output, normed, bias=weights.output_bias, residual=hidden)
        normed = norm(attended, weights.second_norm, weights.epsilon, torch.empty_like(hidden))
        gates = products(normed, weights.gates, hidden.new_empty((tokens, weights.gates.rows)))
        gated = gate(gates, hidden.new_empty((tokens, weights.down.columns)))
        return products(gated, weights.down, normed, residual=attended)
