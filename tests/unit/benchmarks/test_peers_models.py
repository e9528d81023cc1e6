"""The files written for the peers hold the weights that ours reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from memserve.engine.models.ggml_types import GGML_TYPES
from memserve.engine.models.gguf_file import GGUFFile, Value
from memserve.engine.models.spec import StoredMatrix
from peers.gguf_writing import TensorSource, write_gguf
from peers.hf_folders import Entry, expand, gptq_entries, narrow, to_bf16, write_safetensors
from peers.model_files import make_once


def random_q4_0(outputs: int, inputs: int) -> StoredMatrix:
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (outputs, inputs // 32, 18), dtype=np.uint8)
    scales = rng.uniform(0.01, 0.02, (outputs, inputs // 32)).astype("<f2")
    blocks[:, :, :2] = scales[:, :, None].view(np.uint8)
    return StoredMatrix("Q4_0", blocks.reshape(outputs, -1), inputs)


def test_a_gguf_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    norm = rng.standard_normal(5, dtype=np.float32)
    matrix = random_q4_0(3, 64)
    metadata: dict[str, Value] = {
        "general.architecture": "llama",
        "a.number": 7,
        "a.fraction": 0.5,
        "a.flag": True,
        "some.words": ["one", "zwei", "trois"],
        "some.numbers": np.array([1, -2, 3], np.int32),
    }
    tensors = [
        TensorSource("norm", (5,), 0, lambda: norm),
        TensorSource("matrix", (3, 64), 2, lambda: matrix.rows),
    ]
    write_gguf(tmp_path / "a.gguf", metadata, tensors)
    read = GGUFFile(tmp_path / "a.gguf")
    numbers = read.metadata.pop("some.numbers")
    assert isinstance(numbers, np.ndarray)
    assert numbers.tolist() == [1, -2, 3]
    assert read.metadata == {key: value for key, value in metadata.items() if key != "some.numbers"}
    np.testing.assert_array_equal(read.read("norm"), norm)
    np.testing.assert_array_equal(read.read("matrix"), expand(matrix))


def test_gptq_holds_the_very_numbers_of_q4_0() -> None:
    matrix = random_q4_0(16, 64)
    entries = {entry.name: entry.values for entry in gptq_entries("m", matrix)}
    packed = entries["m.qweight"].view(np.uint32)
    nibbles = (packed[:, None, :] >> (4 * np.arange(8, dtype=np.uint32))[None, :, None]) & 15
    quants = nibbles.reshape(64, 16).astype(np.float32)
    zeros = (entries["m.qzeros"].view(np.uint32)[0, 0] & 15) + 1
    scales = entries["m.scales"].astype(np.float32)[entries["m.g_idx"]]
    np.testing.assert_array_equal(((quants - np.float32(zeros)) * scales).T, expand(matrix))


def test_a_safetensors_file_is_read_by_others(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.int32).reshape(2, 3)
    halves = np.array([0.5, -1.5], np.float16)
    path = tmp_path / "model.safetensors"
    write_safetensors(path, iter([Entry("a", "I32", values), Entry("b", "F16", halves)]))
    read = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(read["a"], values)
    np.testing.assert_array_equal(read["b"], halves)
    assert [each.name for each in tmp_path.iterdir()] == ["model.safetensors"]


def test_bf16_is_rounded_to_nearest_even() -> None:
    values = np.random.default_rng(1).standard_normal(1000, dtype=np.float32)
    expected = GGML_TYPES[30].dequantize(to_bf16(values).view(np.uint8))
    np.testing.assert_array_equal(narrow(values), expected)
    assert np.abs(narrow(values) / values - 1).max() <= 2**-8
    halfway = np.array([1 + 2**-8, 1 + 3 * 2**-8], np.float32)
    assert narrow(halfway).tolist() == [1.0, 1 + 2**-6]


def test_half_a_file_is_never_taken_for_whole(tmp_path: Path) -> None:
    def broken(path: Path) -> None:
        path.write_text(json.dumps("half"))
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        make_once(tmp_path / "model", broken)
    assert not (tmp_path / "model").exists()
    assert make_once(tmp_path / "model", lambda path: path.write_text("whole")).read_text() == "whole"
    assert make_once(tmp_path / "model", broken).read_text() == "whole"
