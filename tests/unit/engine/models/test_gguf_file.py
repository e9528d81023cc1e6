"""The GGUF container: what is written can be read, and damage is an error that names the file."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memserve.core.errors import ModelError
from memserve.engine.models.gguf_file import GGUFFile

HEADER = struct.Struct("<4sIQQ")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.number", 7)
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.flag", True)
    writer.add_array("some.words", ["one", "zwölf", ""])
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_tensor("small", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("half", np.arange(64, dtype=np.float16).reshape(2, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_what_was_written(good: Path) -> None:
    file = GGUFFile(good)
    assert file.metadata["a.number"] == 7
    assert file.metadata["a.float"] == 0.5
    assert file.metadata["a.flag"] is True
    assert file.metadata["some.words"] == ["one", "zwölf", ""]
    assert list(file.metadata["some.numbers"]) == [1, 2, 3]
    np.testing.assert_array_equal(file.read("small"), np.arange(6, dtype=np.float32).reshape(2, 3))
    np.testing.assert_array_equal(file.read("half"), np.arange(64, dtype=np.float32).reshape(2, 32))
    assert file.shape("nowhere") is None


def test_every_truncation_is_an_error(good: Path, tmp_path: Path) -> None:
    raw = good.read_bytes()
    used = max(entry.start + entry.size for entry in GGUFFile(good).tensors.values())
    path = tmp_path / "short.gguf"
    for length in range(used):
        path.write_bytes(raw[:length])
        with pytest.raises(ModelError, match=r"short\.gguf"):
            GGUFFile(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.binary(min_size=1, max_size=8)), max_size=4))
def test_any_damage_is_read_or_refused(good: Path, tmp_path: Path, changes: list[tuple[int, bytes]]) -> None:
    raw = bytearray(good.read_bytes())
    for at, replacement in changes:
        raw[at % len(raw) : at % len(raw) + len(replacement)] = replacement
    path = tmp_path / "damaged.gguf"
    path.write_bytes(raw)
    try:
        file = GGUFFile(path)
    except ModelError:
        return
    for name in file.tensors:
        assert file.read(name).shape == file.shape(name)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "cannot be read"),
        (b"PK\x03\x04" + bytes(40), "not a GGUF file"),
        (HEADER.pack(b"GGUF", 1, 0, 0), "version 1 is not supported"),
        (HEADER.pack(b"GGUF", 3 << 24, 0, 0), "is not supported"),
        (HEADER.pack(b"GGUF", 3, 1 << 63, 0), "claims 9223372036854775808 tensors"),
        (HEADER.pack(b"GGUF", 3, 0, 1 << 40), "metadata entries"),
        (HEADER.pack(b"GGUF", 3, 0, 1) + struct.pack("<Q", 1 << 60) + bytes(32), "truncated: a metadata key"),
        (HEADER.pack(b"GGUF", 3, 0, 1) + struct.pack("<Q1sI", 1, b"k", 99) + bytes(32), "k has unknown"),
        (
            HEADER.pack(b"GGUF", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 4, 1 << 61),
            "truncated: k needs",
        ),
        (HEADER.pack(b"GGUF", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 8, 1 << 61), "claims"),
        (HEADER.pack(b"GGUF", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 9, 1 << 61), "nested"),
        (HEADER.pack(b"GGUF", 3, 0, 1) + struct.pack("<Q2sI", 2, b"\xff\xfe", 4) + bytes(9), "UTF-8"),
    ],
)
def test_names_the_damage(tmp_path: Path, raw: bytes, problem: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(ModelError, match=problem) as caught:
        GGUFFile(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("rank", "shape", "kind", "problem"),
    [
        (0, (), 0, "0 dimensions"),
        (5, (1,) * 5, 0, "5 dimensions"),
        (1, (1 << 62,), 0, "truncated: tensor t ends"),
        (2, (1 << 63, 1 << 63), 0, "truncated: tensor t ends"),
        (1, (0,), 0, "impossible"),
        (1, (33,), 8, "impossible for type Q8_0"),
        (1, (32,), 13, "tensor t has type Q5_K"),
        (1, (32,), 4242, "number 4242"),
    ],
)
def test_names_the_damaged_tensor(
    tmp_path: Path, rank: int, shape: tuple[int, ...], kind: int, problem: str
) -> None:
    path = tmp_path / "tensor.gguf"
    described = struct.pack("<Q1sI", 1, b"t", rank) + struct.pack(f"<{len(shape)}Q", *shape)
    path.write_bytes(HEADER.pack(b"GGUF", 3, 1, 0) + described + struct.pack("<IQ", kind, 0) + bytes(64))
    with pytest.raises(ModelError, match=problem):
        GGUFFile(path)


def test_fingerprint_follows_the_content(good: Path, tmp_path: Path) -> None:
    raw = bytearray(good.read_bytes())
    copy = tmp_path / "other-name.gguf"
    copy.write_bytes(raw)
    assert GGUFFile(copy).fingerprint() == GGUFFile(good).fingerprint()
    raw[-40] ^= 1
    copy.write_bytes(raw)
    assert GGUFFile(copy).fingerprint() != GGUFFile(good).fingerprint()
