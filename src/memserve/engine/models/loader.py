"""The one door to models: a reference in, a ``ModelSource`` out, whatever the format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from memserve.engine.models.chat_template import ChatTemplate
from memserve.engine.models.gguf_model import GGUFModel
from memserve.engine.models.resolve import resolve_model
from memserve.engine.models.safetensors_model import SafetensorsModel
from memserve.engine.models.spec import ModelSpec, ModelWeights, StoredWeights
from memserve.engine.models.tokenizer import Tokenizer


class ModelSource(Protocol):
    """An opened model: metadata is checked already, weights and tokenizer are built when asked for."""

    @property
    def spec(self) -> ModelSpec: ...

    def tokenizer(self) -> Tokenizer:
        """Build the tokenizer (about 0.1 s; keep it)."""
        ...

    def chat_template(self) -> ChatTemplate | None:
        """The model's chat template, or None when it has none."""
        ...

    def weights(self, progress: Callable[[float], None] | None = None) -> ModelWeights:
        """Read all weights in float32; ``progress`` hears the fraction done, last 1.0."""
        ...

    def stored_weights(self, progress: Callable[[float], None] | None = None) -> StoredWeights:
        """Weights as the file holds them, read while they are used; ``progress`` as above."""
        ...


def open_model(reference: str) -> ModelSource:
    """Open a model by path, name or hub id (see :func:`resolve_model`); reads metadata only.

    Raises ``ModelError`` naming the file and what is wrong.
    """
    return open_path(resolve_model(reference))


def open_path(path: Path) -> ModelSource:
    """Open a GGUF file or a safetensors folder."""
    return SafetensorsModel(path) if path.is_dir() else GGUFModel(path)
