"""KVLayout: bytes, pieces, fingerprints."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memserve.mempool import KVLayout
from memserve.mempool.layout import Arrangement
from memserve.mempool.modes import TransferMode, cut_blocks

BF16 = KVLayout("model", layers=3, kv_heads=2, head_dim=48)
INT8 = replace(BF16, dtype="int8")


def test_a_block_holds_every_number_and_int8_a_scale_per_token_and_head() -> None:
    numbers = 3 * 2 * 2 * 16 * 48
    assert BF16.block_bytes == 2 * numbers
    assert replace(BF16, dtype="f32").block_bytes == 4 * numbers
    assert INT8.block_bytes == numbers + 4 * (3 * 2 * 2 * 16)


@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 128, 256])
@pytest.mark.parametrize("kv_heads", [1, 3, 8])
def test_every_head_of_int8_stays_aligned_to_a_cache_line(head_dim: int, kv_heads: int) -> None:
    layout = replace(INT8, head_dim=head_dim, kv_heads=kv_heads)
    assert layout.half_layer_bytes % kv_heads == 0
    assert layout.half_layer_bytes // kv_heads % 64 == 0


@pytest.mark.parametrize("arrangement", list(Arrangement))
def test_scales_travel_with_the_values_they_belong_to(arrangement: Arrangement) -> None:
    layout = replace(INT8, arrangement=arrangement)
    assert layout.pieces * layout.piece_bytes == layout.block_bytes
    for mode in (TransferMode.BY_LAYER, TransferMode.BY_REQUEST):
        cut = cut_blocks(layout, mode)
        assert cut.block_bytes == layout.block_bytes
        assert cut.unit_bytes % layout.half_layer_bytes == 0


def test_fingerprints_tell_dtypes_apart() -> None:
    layouts = [replace(BF16, dtype=dtype) for dtype in ("bf16", "int8", "f32")]
    assert len({layout.fingerprint for layout in layouts}) == 3
    assert "int8" in INT8.text


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(AssertionError, match="'int4'"):
        replace(BF16, dtype="int4")
