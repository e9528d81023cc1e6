"""What ``serve`` tells people while it starts and runs. The CLI shows it; tests record it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class StartScreen(Protocol):
    """Where start-up progress and later incidents are shown. No method may block or raise."""

    def loading(self, instance: str, stage: str, fraction: float) -> None:
        """``instance`` is at ``fraction`` (0..1) of ``stage``; called often."""
        ...

    def ready(self, url: str, model: str, lines: Sequence[str] = ()) -> None:
        """Requests for ``model`` are answered at ``url``; ``lines`` say what serves them. Called once."""
        ...

    def lost(self, instance: str, reason: str) -> None:
        """An instance died."""
        ...

    def back(self, instance: str) -> None:
        """An instance that had died takes requests again."""
        ...

    def stopped(self) -> None:
        """Everything has been shut down. Called once, also when start-up failed or was interrupted."""
        ...
