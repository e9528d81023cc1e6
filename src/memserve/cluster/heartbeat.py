"""Heartbeats from a thread of their own, on a socket of their own: no copy, page fault or model step of the
event loop can hold them back, so silence means that the process is dead or frozen."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable

from memserve.core.messages import Heartbeat, LoadReport
from memserve.core.types import InstanceId
from memserve.wire.connection import encode_notification
from memserve.wire.sockets import open_socket

log = logging.getLogger(__name__)


class HeartbeatThread:
    """Sends a ``Heartbeat`` every ``interval`` seconds until stopped or the receiver is gone."""

    def __init__(
        self,
        address: str,
        instance: InstanceId,
        incarnation: int,
        interval: float,
        read_load: Callable[[], LoadReport],
    ) -> None:
        self._address = address
        self._instance = instance
        self._incarnation = incarnation
        self._interval = interval
        self._read_load = read_load
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop and wait for the thread, at most a few intervals."""
        self._stop.set()
        self._thread.join(timeout=4 * self._interval + 1)

    def _run(self) -> None:
        try:
            with open_socket(self._address, timeout=max(1.0, 4 * self._interval)) as connected:
                self._send_until_stopped(connected)
        except OSError as error:
            # The control connection notices the same loss and ends the process; this is only the witness.
            log.info("heartbeats to %s ended: %s", self._address, error)

    def _send_until_stopped(self, connected: socket.socket) -> None:
        while not self._stop.is_set():
            beat = Heartbeat(self._instance, self._incarnation, self._read_load())
            connected.sendall(encode_notification(beat))
            self._stop.wait(self._interval)
