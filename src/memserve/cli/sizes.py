"""Sizes as people write them: ``512MiB``, ``2G``, ``1.5 GiB``, or bytes."""

from __future__ import annotations

import re

from memserve.core.errors import ConfigError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]?)(?:I?B)?", re.IGNORECASE)


def parse_size(text: str, field: str) -> int:
    """Bytes in ``text``; units are powers of 1024. Raises ``ConfigError`` naming ``field``."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            f"{field} is {text!r}; accepted: a number of bytes, or a size such as 512MiB or 2GiB"
        )
    return int(float(match["number"]) * _UNITS[match["unit"].upper()])


def show_size(count: float) -> str:
    """``count`` bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
