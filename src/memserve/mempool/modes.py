"""In which pieces and in which order a transfer moves blocks (paper, section 4.3). Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from memserve.core.errors import InvalidRequest
from memserve.mempool.layout import Arrangement, KVLayout

_HIDE_BYTES = {"shm": 16 << 20}
_HIDE_BYTES_ELSE = 4 << 20
"""From here on sending layers while others are computed saves more time than its calls cost processors:
``benchmarks/transfer_modes.py``, exposed time against whole time."""


class TransferMode(enum.StrEnum):
    """How blocks travel; the paper's three.

    ``BY_LAYER``               layer by layer, each as soon as it is computed where a ``LayerGate`` tells.
    ``BY_REQUEST``             everything at the end, in the pieces in which the layout keeps a block.
    ``BY_REQUEST_AGGREGATED``  everything at the end, whole blocks; only where a block is one piece.
    """

    BY_LAYER = "by_layer"
    BY_REQUEST = "by_request"
    BY_REQUEST_AGGREGATED = "by_request_aggregated"


@dataclass(frozen=True, slots=True)
class Cut:
    """A block as ``parts`` units of ``unit_bytes`` bytes, each contiguous and with a checksum of its own.

    Units travel part by part, and within a part block by block. ``layers`` are those of the model.
    """

    parts: int
    unit_bytes: int
    layers: int

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.parts * self.unit_bytes


def cut_blocks(layout: KVLayout, mode: TransferMode) -> Cut:
    """How ``mode`` cuts blocks of ``layout``. Both sides of a transfer must agree on it.

    Raises ``InvalidRequest`` for whole blocks of a layout that keeps them in pieces.
    """
    if layout.arrangement is Arrangement.DISCRETE:
        if mode is TransferMode.BY_REQUEST_AGGREGATED:
            raise InvalidRequest(
                f"{mode.value} needs blocks in one piece, and the layout's arrangement is "
                f"{layout.arrangement.value}; use {TransferMode.BY_REQUEST.value} or arrangement aggregated",
                field="mode",
            )
        return Cut(layout.pieces, layout.piece_bytes, layout.layers)
    if mode is TransferMode.BY_LAYER:
        return Cut(layout.layers, layout.layer_bytes, layout.layers)
    return Cut(1, layout.block_bytes, layout.layers)


def choose_mode(layout: KVLayout, backend: str, size: int, *, gated: bool) -> TransferMode:
    """The mode for ``size`` bytes over ``backend`` where the caller leaves it open.

    ``gated``: layers are still being computed. The faster the link, the more it takes to be worth hiding.
    """
    if gated and size >= _HIDE_BYTES.get(backend, _HIDE_BYTES_ELSE):
        return TransferMode.BY_LAYER
    if layout.arrangement is Arrangement.DISCRETE:
        return TransferMode.BY_REQUEST
    return TransferMode.BY_REQUEST_AGGREGATED
