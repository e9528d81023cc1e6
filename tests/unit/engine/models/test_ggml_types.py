"""Every storage type expands to exactly what the gguf package makes of it."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from memserve.engine.models.ggml_types import GGML_TYPES, describe_type


@pytest.mark.parametrize("number", sorted(GGML_TYPES))
@pytest.mark.parametrize("blocks", [1, 3, 5000])
def test_equals_the_gguf_package(number: int, blocks: int) -> None:
    stored = GGML_TYPES[number]
    kind = gguf.GGMLQuantizationType(number)
    assert (stored.values, stored.size) == gguf.GGML_QUANT_SIZES[kind]
    raw = random_blocks(stored.name, stored.size, blocks)
    expected = gguf.dequantize(raw, kind).reshape(-1)
    np.testing.assert_array_equal(stored.dequantize(raw.reshape(-1)), expected)


def random_blocks(name: str, size: int, blocks: int) -> np.ndarray:
    """Random bytes whose float16 scales are finite."""
    rng = np.random.default_rng(blocks)
    if name in ("F32", "F16", "BF16"):
        values = rng.standard_normal((blocks, 1)).astype(np.float16 if name == "F16" else np.float32)
        raw = values.view(np.uint8)
        return np.ascontiguousarray(raw[:, 2:] if name == "BF16" else raw)
    raw = rng.integers(0, 256, (blocks, size), dtype=np.uint8)
    for start in {"Q4_1": (0, 2), "Q4_K": (0, 2), "Q6_K": (208,)}.get(name, (0,)):
        raw[:, start : start + 2] = rng.standard_normal((blocks, 1)).astype(np.float16).view(np.uint8)
    return raw


def test_names_unknown_types() -> None:
    assert describe_type(13) == "Q5_K"
    assert describe_type(999) == "number 999"
