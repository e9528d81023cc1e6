"""The cache of packed weights: complete files or none, one winner, and no reason not to start."""

from __future__ import annotations

import logging
import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from memserve.core.errors import ModelError
from memserve.engine.models import packed
from memserve.engine.models.packed import PackedOrigin, PackedWeights
from memserve.engine.models.tiny import tiny_weights
from memserve.engine.runners.native import NativeRunner
from memserve.engine.weights_cache import WeightsCache, default_folder, open_cache


@pytest.fixture(scope="module")
def weights() -> Iterator[PackedWeights]:
    runner = NativeRunner(tiny_weights(1), threads=1, context=64)
    yield runner.packed()
    runner.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"weights of a model")
    return path


@pytest.fixture
def cache(tmp_path: Path) -> WeightsCache:
    return WeightsCache(tmp_path / "cache" / "memserve")


def files(cache: WeightsCache) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir())


def test_what_is_stored_is_found(cache: WeightsCache, model: Path, weights: PackedWeights) -> None:
    origin = PackedOrigin.of(model, "stored")
    assert cache.find(origin) is None
    stored, found = cache.store(origin, weights), cache.find(PackedOrigin.of(model, "stored"))
    assert stored is not None
    assert found is not None
    np.testing.assert_array_equal(found.memory, weights.memory)
    assert cache.find(PackedOrigin.of(model, "bf16")) is None
    assert files(cache) == [cache.path_of(origin).name]
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    assert cache.path_of(origin).stat().st_mode & 0o777 == 0o600


def test_folders_count_with_all_that_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "org--model.v2"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "README.md"):
        (folder / name).write_text(name)
    origin = PackedOrigin.of(folder, "stored")
    assert [Path(file.path).name for file in origin.files] == ["config.json", "model.safetensors"]
    (folder / "README.md").write_text("longer than before")
    assert PackedOrigin.of(folder, "stored") == origin
    (folder / "generation_config.json").write_text("{}")
    assert PackedOrigin.of(folder, "stored") != origin
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="cannot be read"):
        PackedOrigin.of(folder, "stored")


@contextmanager
def without_room(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes: the same error paths as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_nothing_behind(
    cache: WeightsCache, model: Path, weights: PackedWeights, caplog: pytest.LogCaptureFixture
) -> None:
    origin = PackedOrigin.of(model, "stored")
    with without_room(8192):
        assert cache.store(origin, weights) is None
    assert "packed weights are not kept in" in caplog.text
    assert files(cache) == []
    assert cache.store(origin, weights) is not None


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, model: Path, weights: PackedWeights, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    cache = WeightsCache(tmp_path / "file" / "memserve")
    origin = PackedOrigin.of(model, "stored")
    assert cache.store(origin, weights) is None
    assert cache.find(origin) is None
    assert "packed weights are not kept in" in caplog.text


def test_a_damaged_file_is_replaced(
    cache: WeightsCache, model: Path, weights: PackedWeights, caplog: pytest.LogCaptureFixture
) -> None:
    origin = PackedOrigin.of(model, "stored")
    assert cache.store(origin, weights) is not None
    path = cache.path_of(origin)
    os.truncate(path, path.stat().st_size - 1000)
    assert cache.find(origin) is None
    assert "truncated" in caplog.text
    assert "packing the weights again" in caplog.text
    assert cache.store(origin, weights) is not None
    assert cache.find(origin) is not None
    assert len(files(cache)) == 1


def test_another_file_of_the_same_name_size_and_time(
    cache: WeightsCache, model: Path, weights: PackedWeights
) -> None:
    before = model.stat()
    origin = PackedOrigin.of(model, "stored")
    assert cache.store(origin, weights) is not None
    other = model.with_suffix(".new")
    other.write_bytes(b"weights of another")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, model)
    after = model.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    replaced = PackedOrigin.of(model, "stored")
    assert cache.find(replaced) is None
    assert cache.store(replaced, weights) is not None
    assert files(cache) == [cache.path_of(replaced).name], "the old one is of no more use"


def test_a_file_that_changes_while_it_is_read(
    cache: WeightsCache, model: Path, weights: PackedWeights, caplog: pytest.LogCaptureFixture
) -> None:
    origin = PackedOrigin.of(model, "stored")
    model.write_bytes(b"weights in the making")
    assert cache.store(origin, weights) is None
    assert "changed while they were read" in caplog.text
    assert not cache.folder.exists()


def test_only_what_is_of_no_more_use_is_removed(
    cache: WeightsCache,
    model: Path,
    weights: PackedWeights,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone, kept = tmp_path / "gone.gguf", tmp_path / "kept.gguf"
    origins = {}
    for path in (gone, kept):
        path.write_bytes(b"x")
        origins[path] = PackedOrigin.of(path, "stored")
        assert cache.store(origins[path], weights) is not None
    with monkeypatch.context() as newer:
        newer.setattr(packed, "FILE_VERSION", packed.FILE_VERSION + 1)
        with (cache.folder / "newer.packed").open("wb") as file:
            packed.write_packed(file, origins[gone], weights)
    with monkeypatch.context() as older:
        older.setattr(packed, "FILE_VERSION", 0)
        with (cache.folder / "older.packed").open("wb") as file:
            packed.write_packed(file, origins[kept], weights)
    (cache.folder / "foreign.packed").write_bytes(b"somebody else's")
    (cache.folder / ".young.tmp").write_bytes(b"being written")
    (cache.folder / ".old.tmp").write_bytes(b"its writer was killed")
    os.utime(cache.folder / ".old.tmp", (0, 0))
    gone.unlink()
    origin = PackedOrigin.of(model, "stored")
    assert cache.store(origin, weights) is not None
    names = [cache.path_of(one).name for one in (origin, origins[kept])]
    assert files(cache) == sorted([".young.tmp", "foreign.packed", "newer.packed", *names])


def test_of_many_first_starts_at_once_one_wins(
    cache: WeightsCache, model: Path, weights: PackedWeights
) -> None:
    origin = PackedOrigin.of(model, "stored")
    together, found = threading.Barrier(8), []

    def start() -> None:
        together.wait(30)
        stored = cache.store(origin, weights)
        assert stored is not None
        found.append(stored)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 8
    for one in found:
        np.testing.assert_array_equal(one.memory, weights.memory)
    assert files(cache) == [cache.path_of(origin).name]


def test_where_the_cache_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "memserve"
    monkeypatch.setenv("HOME", "/home/somebody")
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert default_folder() == Path("/home/somebody/.cache/memserve")
    assert open_cache("off") is None
    given = open_cache("~/w")
    assert given is not None
    assert given.folder == Path("/home/somebody/w")

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    with caplog.at_level(logging.WARNING):
        assert open_cache(None) is None
    assert "name a folder with --weights-cache" in caplog.text
