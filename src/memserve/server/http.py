"""The HTTP server and its app. Importing this takes longer than all else that ``serve`` needs."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from memserve.server.app import create_app

__all__ = ["HttpServer", "create_app"]


class HttpServer(uvicorn.Server):
    """Uvicorn without its own signal handling: stopping is the composition root's business."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, lifespan="off", ws="none")
        )
        self.answers = asyncio.Event()
        """Set once requests are accepted."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.answers.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
