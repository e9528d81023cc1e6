"""NativeRunner's door: what it accepts, what it refuses and in which words."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import numpy as np
import pytest

from memserve import _native
from memserve.core.errors import ConfigError, ModelError
from memserve.engine.models.tiny import tiny_weights
from memserve.engine.runners.base import ForwardBatch, Runner
from memserve.engine.runners.native import NativeRunner, rope_tables


@pytest.fixture
def runner() -> Iterator[NativeRunner]:
    runner = NativeRunner(tiny_weights(1), threads=1, context=64)
    yield runner
    runner.close()


class Pool:
    """Memory for one sequence of 64 tokens."""

    def __init__(self, runner: Runner) -> None:
        self.memory = np.full(4 * runner.layout.block_bytes, 0xFF, np.uint8)
        start = np.uint64(self.memory.ctypes.data)
        self.blocks = start + np.arange(4, dtype=np.uint64)[None] * np.uint64(runner.layout.block_bytes)

    def batch(self, rows: int = 3, **changed: object) -> ForwardBatch:
        batch = ForwardBatch(
            tokens=np.arange(rows, dtype=np.int32),
            positions=np.arange(rows, dtype=np.int32),
            starts=np.array([0, rows], np.int32),
            blocks=self.blocks,
            logit_rows=np.array([rows - 1], np.int32),
        )
        return dataclasses.replace(batch, **changed)  # type: ignore[arg-type]


def test_is_a_runner_on_the_best_isa(runner: NativeRunner) -> None:
    typed: Runner = runner
    assert typed.isa == _native.supported_isas()[0]
    assert (typed.layout.dtype, typed.layout.order) == ("bf16", "tile")
    assert typed.layout.model == tiny_weights(1).spec.identity


def test_int8_kv_is_another_layout_of_about_half_the_bytes(runner: NativeRunner) -> None:
    int8 = NativeRunner(tiny_weights(1), threads=1, context=64, kv_dtype="int8")
    assert (int8.layout.dtype, int8.layout.order) == ("int8", "tile")
    assert int8.layout.fingerprint != runner.layout.fingerprint
    dim = runner.layout.head_dim
    assert int8.layout.block_bytes * 2 * dim == runner.layout.block_bytes * (dim + 4)
    int8.close()


def test_only_wanted_rows_come_back(runner: NativeRunner) -> None:
    pool = Pool(runner)
    everything = runner.forward(pool.batch(20, logit_rows=np.arange(20, dtype=np.int32)))
    some = runner.forward(pool.batch(20, logit_rows=np.array([0, 7, 19], np.int32)))
    none = runner.forward(pool.batch(20, logit_rows=np.zeros(0, np.int32)))
    assert everything.shape == (20, 256)
    np.testing.assert_array_equal(some, everything[[0, 7, 19]])
    assert none.shape == (0, 256)


def test_logits_stay_as_they_are_while_they_are_held(runner: NativeRunner) -> None:
    pool = Pool(runner)
    held = runner.forward(pool.batch())
    copy = held.copy()
    runner.forward(pool.batch(tokens=np.array([9, 8, 7], np.int32)))
    np.testing.assert_array_equal(held, copy)


def test_writes_nothing_outside_its_tokens(runner: NativeRunner) -> None:
    """K: [kv_heads][head_dim / 2][16][2]; V: [kv_heads][8][head_dim][2]; all else keeps its 0xFF."""
    pool = Pool(runner)
    runner.forward(pool.batch(3))
    layout = runner.layout
    shape = (layout.layers, 2, layout.kv_heads, layout.head_dim * 16)
    halves = pool.memory.view(np.uint16).reshape(4, *shape)
    keys = halves[0, :, 0].reshape(layout.layers, layout.kv_heads, layout.head_dim // 2, 16, 2)
    values = halves[0, :, 1].reshape(layout.layers, layout.kv_heads, 8, layout.head_dim, 2)
    assert (keys[..., :3, :] != 0xFFFF).all()
    assert (keys[..., 3:, :] == 0xFFFF).all()
    assert (values[:, :, 0] != 0xFFFF).all()
    assert (values[:, :, 1, :, 0] != 0xFFFF).all()
    assert (values[:, :, 1, :, 1] == 0xFFFF).all()
    assert (values[:, :, 2:] == 0xFFFF).all()
    assert (halves[1:] == 0xFFFF).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": np.array([0, 256, 1], np.int32)}, "row 1: token outside the vocabulary"),
        ({"tokens": np.array([0, -1, 1], np.int32)}, "row 1: token outside the vocabulary"),
        ({"positions": np.array([62, 63, 64], np.int32)}, "row 2: position outside the context of 64"),
        ({"positions": np.array([0, 2, 3], np.int32)}, "row 1: positions must ascend by one"),
        ({"positions": np.array([0, 1], np.int32)}, "positions must be as many as tokens"),
        ({"starts": np.array([0, 2], np.int32)}, "end with the number of rows"),
        ({"starts": np.array([0, 1, 3], np.int32)}, "starts must be one more than sequences"),
        ({"blocks": np.zeros((1, 1), np.uint64)}, "block 0 has no address"),
        ({"blocks": np.zeros((1, 0), np.uint64)}, "too few blocks"),
        ({"logit_rows": np.array([3], np.int32)}, "logit_rows"),
        ({"logit_rows": np.array([1, 1], np.int32)}, "logit_rows"),
    ],
)
def test_a_batch_that_does_not_hold_together(
    runner: NativeRunner, changed: dict[str, object], message: str
) -> None:
    pool = Pool(runner)
    with pytest.raises(ValueError, match=message):
        runner.forward(pool.batch(**changed))
    assert (pool.memory == 0xFF).all()


def test_more_threads_than_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    with pytest.raises(ConfigError, match=f"threads is {cores + 1}.* 1 to {cores} cores"):
        NativeRunner(tiny_weights(1), threads=cores + 1, context=64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threads": 0}, "threads is 0"),
        ({"context": 0}, "context is 0"),
        ({"isa": "sse9"}, "'sse9' does not run on this machine"),
        ({"kv_dtype": "fp8"}, "kv_dtype is 'fp8'; accepted: bf16, int8"),
    ],
)
def test_impossible_settings(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NativeRunner(tiny_weights(1), **{"threads": 1, "context": 64, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"head_dim": 24}, "head_dim is 24"),
        ({"head_dim": 272}, "head_dim is 272"),
        ({"feed_forward": 100}, "feed_forward is 100"),
        ({"heads": 5, "kv_heads": 2, "head_dim": 16}, r"heads \(5\) is no multiple of kv_heads \(2\)"),
    ],
)
def test_shapes_without_a_kernel(shape: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NativeRunner(tiny_weights(1, **shape), threads=1, context=64)  # type: ignore[arg-type]


def test_weights_that_contradict_their_spec() -> None:
    weights = tiny_weights(1)
    weights.layers[1].k = weights.layers[1].k[:-1]
    with pytest.raises(ModelError, match=r"k has shape \[31, 64\], not \[32, 64\]"):
        NativeRunner(weights, threads=1, context=64)
    with pytest.raises(ModelError, match="1 layers of weights, the spec says 2"):
        NativeRunner(dataclasses.replace(weights, layers=weights.layers[:1]), threads=1, context=64)


@pytest.mark.parametrize("name", ["q_bias", "k_bias", "v_bias", "q_norm", "k_norm"])
def test_vectors_that_contradict_their_spec(name: str) -> None:
    weights, plain = tiny_weights(1, attention_bias=True, qk_norm=True), tiny_weights(1)
    given = getattr(weights.layers[1], name)
    setattr(weights.layers[1], name, None)
    with pytest.raises(ModelError, match=f"layer 1 has no {name}"):
        NativeRunner(weights, threads=1, context=64)
    setattr(weights.layers[1], name, given[:-1])
    with pytest.raises(ModelError, match="values, not"):
        NativeRunner(weights, threads=1, context=64)
    setattr(plain.layers[0], name, given)
    with pytest.raises(ModelError, match=f"layer 0 has a {name}"):
        NativeRunner(plain, threads=1, context=64)


def test_pinned_threads_compute_the_same(runner: NativeRunner) -> None:
    cores = sorted(os.sched_getaffinity(0), reverse=True)
    pinned = NativeRunner(tiny_weights(1), threads=len(cores), context=64, cores=cores)
    pool, other = Pool(runner), Pool(runner)
    np.testing.assert_array_equal(pinned.forward(pool.batch(40)), runner.forward(other.batch(40)))
    pinned.close()


def test_rope_tables_follow_the_formula() -> None:
    spec = tiny_weights(1).spec
    cosines, sines = rope_tables(spec, 50)
    angle = 49 * spec.rope_theta ** (-2 * 3 / spec.head_dim)
    assert cosines.shape == sines.shape == (50, spec.head_dim // 2)
    np.testing.assert_allclose([cosines[49, 3], sines[49, 3]], [np.cos(angle), np.sin(angle)], rtol=1e-6)
