"""Loading a model: packed once, mapped ever after, and right in either case."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import model_fixtures
from memserve.core.config import Config, EngineConfig, ModelConfig
from memserve.core.errors import ConfigError, ModelError
from memserve.engine.loading import LoadedModel, load_model
from memserve.engine.runners.base import ForwardBatch


@pytest.fixture(params=["llama-3.1", "qwen2", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    fixture = model_fixtures.load_fixture(request.param)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fixture.config))
    save_file(fixture.tensors, folder / "model.safetensors")
    return folder


class Loads:
    """Loads one model again and again; ``read`` tells whether the model's own files were needed."""

    def __init__(self, model: Path, cache: str) -> None:
        self._config = Config(
            model=ModelConfig(model=str(model), context=64), engine=EngineConfig(weights_cache=cache)
        )
        self.read = False

    def __call__(self) -> LoadedModel:
        self.read = False

        def progress(stage: str, fraction: float) -> None:
            self.read = True

        return load_model(self._config, 1, (), progress)


def logits_of(loaded: LoadedModel) -> np.ndarray:
    size = loaded.runner.layout.block_bytes
    memory = np.zeros(2 * size, np.uint8)
    blocks = np.uint64(memory.ctypes.data) + np.arange(2, dtype=np.uint64)[None] * np.uint64(size)
    rows = np.arange(20, dtype=np.int32)
    logits = loaded.runner.forward(ForwardBatch(rows, rows, np.array([0, 20], np.int32), blocks, rows)).copy()
    loaded.runner.close()
    return logits


def test_a_second_start_needs_no_model_file(model: Path, tmp_path: Path) -> None:
    load, plain = Loads(model, str(tmp_path / "cache")), Loads(model, "off")
    expected = plain()
    first = load()
    assert load.read
    second = load()
    assert not load.read
    assert expected.spec == first.spec == second.spec
    assert expected.runner.layout == second.runner.layout
    logits = logits_of(expected)
    np.testing.assert_array_equal(logits_of(first), logits)
    np.testing.assert_array_equal(logits_of(second), logits)


def test_a_replaced_model_is_read_again(model: Path, tmp_path: Path) -> None:
    load = Loads(model, str(tmp_path / "cache"))
    load().runner.close()
    path = model / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 0x40
    path.write_bytes(raw)
    changed = load()
    assert load.read
    np.testing.assert_array_equal(logits_of(changed), logits_of(Loads(model, "off")()))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_torn_file_is_packed_again(model: Path, tmp_path: Path) -> None:
    load = Loads(model, str(tmp_path / "cache"))
    expected = logits_of(load())
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    again = load()
    assert load.read
    np.testing.assert_array_equal(logits_of(again), expected)
    load().runner.close()
    assert not load.read


def test_a_folder_that_cannot_be_written_costs_a_warning(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    loaded = Loads(model, str(tmp_path / "file" / "cache"))()
    assert "packed weights are not kept" in caplog.text
    np.testing.assert_array_equal(logits_of(loaded), logits_of(Loads(model, "off")()))


def test_a_context_is_checked_on_either_way(model: Path, tmp_path: Path) -> None:
    engine = EngineConfig(weights_cache=str(tmp_path / "cache"))
    Loads(model, str(tmp_path / "cache"))().runner.close()
    for one in (engine, EngineConfig(weights_cache="off")):
        config = Config(model=ModelConfig(model=str(model), context=1 << 20), engine=one)
        with pytest.raises(ConfigError, match=r"model\.context is 1048576"):
            load_model(config, 1, (), lambda stage, fraction: None)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    config = Config(model=ModelConfig(model=str(tmp_path / "none.gguf")))
    with pytest.raises(ModelError, match="no such file"):
        load_model(config, 1, (), lambda stage, fraction: None)
