"""Typed access to a GGUF file's metadata; complaints name the file and the key. Knows no key's meaning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from memserve.core.errors import ModelError
from memserve.engine.models.gguf_file import Value
from memserve.engine.models.spec import Float


class Metadata:
    """Entries by key. A key that begins with a dot belongs to the architecture: ``.block_count``.

    Without a default a missing key is a ``ModelError``, as is a value of another kind.
    """

    def __init__(self, path: Path, entries: Mapping[str, Value]) -> None:
        self.path = path
        self._entries = entries
        self.architecture = self.text("general.architecture")

    def __contains__(self, key: str) -> bool:
        return self._full(key) in self._entries

    def text(self, key: str, default: str | None = None) -> str:
        value = self._entries.get(self._full(key), default)
        if not isinstance(value, str):
            raise self.complain(key, "a string")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._entries.get(self._full(key), default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 32:
            raise self.complain(key, "a number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._entries.get(self._full(key), default)
        if not isinstance(value, int | float):
            raise self.complain(key, "a number")
        return float(value)

    def flag(self, key: str) -> bool | None:
        value = self._entries.get(self._full(key))
        if not isinstance(value, bool | None):
            raise self.complain(key, "true or false")
        return value

    def numbers(self, key: str) -> Float | None:
        value = self._entries.get(self._full(key))
        if value is None:
            return None
        if not isinstance(value, np.ndarray):
            raise self.complain(key, "a list of numbers")
        return value.astype(np.float32)

    def texts(self, key: str, default: list[str] | None = None) -> list[str]:
        value = self._entries.get(self._full(key), default)
        if not isinstance(value, list):
            raise self.complain(key, "a list of strings")
        return value

    def fail(self, problem: str) -> ModelError:
        return ModelError(f"{self.path}: {problem}")

    def complain(self, key: str, expected: str) -> ModelError:
        """What is wrong with the value at ``key``."""
        value = self._entries.get(self._full(key))
        if value is None:
            return self.fail(f"metadata key {self._full(key)} is missing")
        return self.fail(f"metadata key {self._full(key)} is {str(value)[:60]!r}; expected {expected}")

    def _full(self, key: str) -> str:
        return self.architecture + key if key.startswith(".") else key
