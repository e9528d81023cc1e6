"""Files of packed weights: what was written comes back, and nothing else ever does."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from memserve import _native
from memserve.core.errors import ModelError
from memserve.engine.models import packed
from memserve.engine.models.ggml_types import GGML_TYPES
from memserve.engine.models.packed import FileState, PackedOrigin, PackedWeights, map_packed, write_packed
from memserve.engine.models.rope import (
    FrequencyDivisors,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
)
from memserve.engine.models.spec import Matrix, ModelWeights, StoredLayer, StoredMatrix, StoredWeights
from memserve.engine.models.tiny import tiny_weights
from memserve.engine.runners.base import ForwardBatch
from memserve.engine.runners.native import NativeRunner

EVERY_ISA = [*_native.supported_isas(), *_native.emulated_isas()]
ORIGIN = PackedOrigin("tiny", (FileState("/models/tiny.gguf", 1, 2, 3),), "stored")
SCALINGS: list[RopeScaling] = [
    LinearScaling(2.0),
    Llama3Scaling(8.0, 1.0, 4.0, 64),
    YarnScaling(4.0, 64),
    FrequencyDivisors((1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0, 8.0)),
]

Run = Callable[..., NativeRunner]


@pytest.fixture
def run() -> Iterator[Run]:
    """Build runners that are closed after the test."""
    built: list[NativeRunner] = []

    def make(weights: ModelWeights | StoredWeights | PackedWeights, **more: object) -> NativeRunner:
        built.append(NativeRunner(weights, **{"threads": 1, "context": 64, **more}))  # type: ignore[arg-type]
        return built[-1]

    yield make
    for runner in built:
        runner.close()


def write(path: Path, weights: PackedWeights, origin: PackedOrigin = ORIGIN) -> Path:
    with path.open("wb") as file:
        write_packed(file, origin, weights)
    return path


def logits_of(runner: NativeRunner) -> np.ndarray:
    size = runner.layout.block_bytes
    memory = np.zeros(2 * size, np.uint8)
    blocks = np.uint64(memory.ctypes.data) + np.arange(2, dtype=np.uint64)[None] * np.uint64(size)
    rows = np.arange(20, dtype=np.int32)
    return runner.forward(ForwardBatch(rows, rows, np.array([0, 20], np.int32), blocks, rows)).copy()


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({}, id="tied"),
        pytest.param({"tied": False, "layers": 3}, id="untied"),
        pytest.param({"attention_bias": True, "qk_norm": True}, id="vectors"),
        *[pytest.param({"rope_scaling": scaling}, id=type(scaling).__name__) for scaling in SCALINGS],
    ],
)
def test_a_mapped_model_computes_the_same_bits(shape: dict[str, object], run: Run, tmp_path: Path) -> None:
    weights = tiny_weights(1, **shape)  # type: ignore[arg-type]
    runner = run(weights)
    kept = map_packed(write(tmp_path / "w", runner.packed()), ORIGIN)
    assert kept.spec == weights.spec
    mapped = run(kept)
    assert mapped.weight_bytes == runner.weight_bytes
    np.testing.assert_array_equal(logits_of(mapped), logits_of(runner))


@pytest.mark.parametrize("keep", ["bf16", "int8"])
def test_other_ways_to_keep_weights(keep: str, run: Run, tmp_path: Path) -> None:
    runner = run(tiny_weights(1), keep=keep)
    kept = map_packed(write(tmp_path / "w", runner.packed()), ORIGIN)
    np.testing.assert_array_equal(logits_of(run(kept, keep=keep)), logits_of(runner))


def test_mapped_weights_cannot_be_written(run: Run, tmp_path: Path) -> None:
    kept = map_packed(write(tmp_path / "w", run(tiny_weights(1)).packed()), ORIGIN)
    with pytest.raises(ValueError, match="read-only"):
        kept.memory[0] = 1


def test_packed_weights_outlive_their_runner(run: Run) -> None:
    runner = run(tiny_weights(1))
    expected, kept = logits_of(runner), runner.packed()
    runner.close()
    np.testing.assert_array_equal(logits_of(run(kept)), expected)


# --- damage ---


@pytest.fixture
def file(run: Run, tmp_path: Path) -> Path:
    return write(tmp_path / "w", run(tiny_weights(1, layers=1)).packed())


def test_every_changed_byte_is_noticed(file: Path) -> None:
    """All but the padding between header and data, which nobody reads."""
    sound = file.read_bytes()
    header_end = packed._PREFIX.size + packed._PREFIX.unpack(sound[: packed._PREFIX.size])[3]
    start = packed._data_start(header_end - packed._PREFIX.size)
    rng = np.random.default_rng(0)
    places = [*range(header_end), *rng.integers(start, len(sound), 300).tolist(), start, len(sound) - 1]
    for at in places:
        with file.open("r+b") as opened:
            opened.seek(at)
            opened.write(bytes([sound[at] ^ 0x10]))
        with pytest.raises(ModelError, match=r"w: "):
            map_packed(file, ORIGIN)
        file.write_bytes(sound)
    map_packed(file, ORIGIN)


def test_torn_files_are_noticed(file: Path) -> None:
    sound = file.read_bytes()
    for size in [0, 1, 8, 39, 40, 41, 400, 4096, len(sound) // 2, len(sound) - 1]:
        file.write_bytes(sound[:size])
        with pytest.raises(ModelError):
            map_packed(file, ORIGIN)
    file.write_bytes(sound + b"\0")
    with pytest.raises(ModelError, match="truncated, or damaged"):
        map_packed(file, ORIGIN)


def test_a_hole_where_data_should_be_is_noticed(file: Path) -> None:
    """What a crash leaves where a file's length reached the disk and its bytes did not."""
    size = file.stat().st_size
    os.truncate(file, size // 2)
    os.truncate(file, size)
    with pytest.raises(ModelError, match="wrong checksum"):
        map_packed(file, ORIGIN)


def test_foreign_files_and_other_origins_are_refused(file: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"GGUF" + bytes(1000))
    with pytest.raises(ModelError, match="is no file of packed weights"):
        map_packed(foreign, ORIGIN)
    for other in (
        PackedOrigin("tiny", ORIGIN.files, "bf16"),
        PackedOrigin("tiny", (FileState("/models/tiny.gguf", 1, 2, 4),), "stored"),
        PackedOrigin("tiny", ORIGIN.files, "stored", version="0.0.0"),
    ):
        with pytest.raises(ModelError, match="another model or setting"):
            map_packed(file, other)
    with pytest.raises(FileNotFoundError):
        map_packed(tmp_path / "none", ORIGIN)
    with pytest.raises(ModelError, match="cannot be read"):
        map_packed(tmp_path, ORIGIN)


def test_other_versions_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "FILE_VERSION", packed.FILE_VERSION + 1)
    with pytest.raises(ModelError, match=r"has version 1\.1; this is 2\.1"):
        map_packed(file, ORIGIN)


def test_matrices_of_another_shape_are_refused(run: Run) -> None:
    small, kept = tiny_weights(1, layers=1), run(tiny_weights(1)).packed()
    wrong = PackedWeights(small.spec, "stored", kept.memory, kept.matrices, kept.layers[:1], kept.output_norm)
    with pytest.raises(ModelError, match="packed weights: "):
        run(wrong)
    for changed in (
        [(7, *kept.matrices[0][1:]), *kept.matrices[1:]],
        [(*kept.matrices[0][:3], 1), *kept.matrices[1:]],
        [(*kept.matrices[0][:3], 1 << 40), *kept.matrices[1:]],
        [(0, 0, 64, 0), *kept.matrices[1:]],
        kept.matrices[:-1],
        [*kept.matrices, kept.matrices[-1], kept.matrices[-1]],
    ):
        spoilt = PackedWeights(kept.spec, "stored", kept.memory, changed, kept.layers, kept.output_norm)
        with pytest.raises(ModelError, match="packed weights: "):
            run(spoilt)


# --- what the version of the layout stands for ---

_LAYOUTS = {
    1: {
        "F32": "89986f1cfd5f3f97",
        "Q4_0": "c552a6dfbfcfd440",
        "Q4_1": "788d34e6291db2c7",
        "Q8_0": "4fa16ac7572b3f41",
        "Q4_K": "1d9ab00baad6f8ed",
        "Q6_K": "86737c35c221f7d4",
        "int8": "97c85cb3528721c8",
    }
}


@pytest.mark.parametrize("kind", ["F32", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "int8"])
def test_a_layout_keeps_its_number(kind: str, run: Run) -> None:
    """A change of what packing makes must come with another ``kPackedLayout`` in native/kernels.h."""
    found = run(plain_weights(kind), keep="int8" if kind == "int8" else "stored").packed().memory
    digest = hashlib.blake2b(found, digest_size=8).hexdigest()
    assert digest == _LAYOUTS[_native.packed_layout][kind]


@pytest.mark.parametrize("keep", ["stored", "bf16", "int8"])
@pytest.mark.parametrize("isa", EVERY_ISA)
def test_packed_bytes_are_equal_on_all_instruction_sets(isa: str, keep: str, run: Run) -> None:
    """So a file may be used by any build on any machine of the same byte order."""
    for kind in ("Q4_1", "Q6_K"):
        here, portable = (run(plain_weights(kind), isa=one, keep=keep) for one in (isa, "portable"))
        np.testing.assert_array_equal(here.packed().memory, portable.packed().memory)


def plain_weights(kind: str) -> StoredWeights:
    """A model of one layer whose matrices are a plain pattern, of one type."""
    spec = tiny_weights(1, layers=1, hidden=256, feed_forward=256, vocabulary=40).spec

    def matrix(outputs: int, inputs: int) -> Matrix:
        if kind in ("F32", "int8"):
            pattern = np.arange(outputs * inputs, dtype=np.float32) % 1021 - 510
            return (pattern / 512).reshape(outputs, inputs)
        stored = next(one for one in GGML_TYPES.values() if one.name == kind)
        size = stored.size * inputs // stored.values
        raw = (np.arange(outputs * size, dtype=np.uint32) * 37 % 251).astype(np.uint8).reshape(outputs, -1)
        blocks = raw.reshape(-1, stored.size)
        for at in (208,) if kind == "Q6_K" else (0, 2):
            blocks[:, at : at + 2] = np.array([0x2211 + at], "<u2").view(np.uint8)
        return StoredMatrix(kind, raw, inputs)

    norm = np.ones(256, np.float32)
    layer = StoredLayer(
        attention_norm=norm,
        ffn_norm=norm,
        q=matrix(256, 256),
        k=matrix(128, 256),
        v=matrix(128, 256),
        o=matrix(256, 256),
        gate=matrix(256, 256),
        up=matrix(256, 256),
        down=matrix(256, 256),
    )
    return StoredWeights(spec, matrix(40, 256), norm, None, [layer])
