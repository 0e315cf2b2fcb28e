"""What the attention kernels are told: the heads of a layer with their blocks, and the histories of a step's rows.

Tensors and integers; knows no models.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """A layer's attention.

    keys, values  the layer's blocks. Shape: (blocks, kv_heads, block_tokens, width)
    query_norm, key_norm  RMSNorm over a head before it is turned. Shape: (width,); both or none
    epsilon       of those norms
    scaling       what scores are multiplied by
    window        the most tokens that a token sees, itself included; None: all
    """

    heads: int
    kv_heads: int
    width: int
    keys: Tensor
    values: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    epsilon: float
    scaling: float
    window: int | None

    @property
    def block_tokens(self) -> int:
        """Tokens in a block."""
        return int(self.keys.shape[2])


@dataclass(frozen=True)
class History:
    """Where the tokens of a step stand.

    lengths     int32 (rows,): tokens that a row has in its blocks before the step; -1: there is no such row
    tables      int32 (rows, blocks): ids of a row's blocks in order
    positions   int32 (tokens,): position of each new token in its sequence
    token_rows  int32 (tokens,): the row of each new token
    starts      int32 (rows + 1,): row r's new tokens are starts[r] to starts[r + 1]; not read for decoding
    longest     the most new tokens of a row
    """

    lengths: Tensor
    tables: Tensor
    positions: Tensor
    token_rows: Tensor
    starts: Tensor
    longest: int = 1
