"""How KV lies inside a block. Pools exchange blocks only if their layouts have the same fingerprint."""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass

_DTYPE_BYTES = {"bf16": 2, "f32": 4, "int8": 1}
_SCALE_BYTES = {"int8": 4}
_ORDERS = ("tile", "plain")


class Arrangement(enum.StrEnum):
    """How blocks lie in a segment of memory.

    ``AGGREGATED``  [blocks][layers][K, V]: a block is one contiguous piece.
    ``DISCRETE``    [layers][K, V][blocks]: a block is 2 x layers pieces (paper, section 4.3).
    """

    AGGREGATED = "aggregated"
    DISCRETE = "discrete"


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of a block: ``block_tokens`` tokens, K and V of all layers, in memory as ``arrangement`` says.

    ``order`` names the arrangement inside a layer's piece, all indices row-major:

    ``tile``   K: [kv_heads][head_dim/2][block_tokens][2], V: [kv_heads][block_tokens/2][head_dim][2];
               neighbouring pairs are what bf16 dot-product instructions and AMX tiles read in place.
    ``plain``  K: [kv_heads][block_tokens][head_dim], V: the same.

    With ``dtype`` ``int8`` each head's values follow its scales, float32[block_tokens]: what moves a layer's
    K or V moves both. A number is its int8 times the scale of its token and head, which is the largest
    absolute one / 127. In blocks of 16 tokens heads stay aligned to 64 bytes if head_dim is a multiple of 4.

    ``model`` identifies the weights: KV of different models is never exchanged.
    """

    model: str
    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int = 16
    dtype: str = "bf16"
    order: str = "tile"
    arrangement: Arrangement = Arrangement.AGGREGATED

    def __post_init__(self) -> None:
        assert self.dtype in _DTYPE_BYTES, f"dtype {self.dtype!r} is none of {sorted(_DTYPE_BYTES)}"
        assert self.order in _ORDERS, f"order {self.order!r} is none of {_ORDERS}"

    @property
    def half_layer_bytes(self) -> int:
        """Bytes of one layer's K (or V) in one block."""
        values = self.head_dim * _DTYPE_BYTES[self.dtype]
        return self.kv_heads * self.block_tokens * (values + _SCALE_BYTES.get(self.dtype, 0))

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's K and V in one block."""
        return 2 * self.half_layer_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: all layers."""
        return self.layers * self.layer_bytes

    @property
    def pieces(self) -> int:
        """Contiguous pieces of memory per block."""
        return 1 if self.arrangement is Arrangement.AGGREGATED else 2 * self.layers

    @property
    def piece_bytes(self) -> int:
        """Bytes of each piece."""
        return self.block_bytes // self.pieces

    @property
    def text(self) -> str:
        """The layout for people, and what the fingerprint is made of."""
        return (
            f"{self.model}: {self.layers} layers x {self.kv_heads} kv heads x {self.head_dim}, "
            f"{self.block_tokens} tokens per block, {self.dtype}, {self.order} order, {self.arrangement}"
        )

    @property
    def fingerprint(self) -> str:
        """32 hex digits that are equal exactly for equal layouts."""
        return hashlib.blake2b(self.text.encode(), digest_size=16).hexdigest()

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold ``tokens`` tokens, the last one perhaps partly."""
        return -(-tokens // self.block_tokens)
