"""Modes: how blocks are cut, what the pool chooses by itself, and what a layout does not have."""

from __future__ import annotations

import dataclasses

import pytest

from memserve.core.errors import InvalidRequest
from memserve.mempool import Arrangement, KVLayout, TransferMode
from memserve.mempool.modes import Cut, choose_mode, cut_blocks

WHOLE = KVLayout("m", layers=3, kv_heads=2, head_dim=4, block_tokens=4)
PIECES = dataclasses.replace(WHOLE, arrangement=Arrangement.DISCRETE)


def test_the_arrangement_is_part_of_the_fingerprint() -> None:
    assert WHOLE.fingerprint != PIECES.fingerprint
    assert "discrete" in PIECES.text
    assert (WHOLE.pieces, WHOLE.piece_bytes) == (1, WHOLE.block_bytes)
    assert (PIECES.pieces, PIECES.piece_bytes) == (6, PIECES.half_layer_bytes)
    assert WHOLE.block_bytes == PIECES.block_bytes


@pytest.mark.parametrize(
    ("layout", "mode", "parts"),
    [
        (WHOLE, TransferMode.BY_REQUEST_AGGREGATED, 1),
        (WHOLE, TransferMode.BY_REQUEST, 1),
        (WHOLE, TransferMode.BY_LAYER, 3),
        (PIECES, TransferMode.BY_REQUEST, 6),
        (PIECES, TransferMode.BY_LAYER, 6),
    ],
)
def test_units_make_up_a_block(layout: KVLayout, mode: TransferMode, parts: int) -> None:
    cut = cut_blocks(layout, mode)
    assert cut == Cut(parts, layout.block_bytes // parts, 3)
    assert cut.block_bytes == layout.block_bytes


def test_whole_blocks_of_a_discrete_layout_are_refused_with_a_remedy() -> None:
    with pytest.raises(InvalidRequest, match="use by_request or arrangement aggregated") as caught:
        cut_blocks(PIECES, TransferMode.BY_REQUEST_AGGREGATED)
    assert caught.value.field == "mode"


@pytest.mark.parametrize(("backend", "much"), [("shm", 16 << 20), ("tcp", 4 << 20), ("nixl", 4 << 20)])
def test_the_default_goes_by_layer_only_where_there_is_something_to_hide(backend: str, much: int) -> None:
    assert choose_mode(WHOLE, backend, much, gated=True) is TransferMode.BY_LAYER
    assert choose_mode(WHOLE, backend, much, gated=False) is TransferMode.BY_REQUEST_AGGREGATED
    assert choose_mode(WHOLE, backend, much - 1, gated=True) is TransferMode.BY_REQUEST_AGGREGATED
    assert choose_mode(PIECES, backend, much, gated=True) is TransferMode.BY_LAYER
    assert choose_mode(PIECES, backend, much, gated=False) is TransferMode.BY_REQUEST
