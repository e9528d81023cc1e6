"""Messages over stream sockets. Knows frames, calls and deadlines; does not know what the messages mean."""

from memserve.wire.connection import Connection, Handler, connect, listen, listening_address
from memserve.wire.security import Security

__all__ = ["Connection", "Handler", "Security", "connect", "listen", "listening_address"]
