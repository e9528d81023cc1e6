"""Messages over stream sockets. Knows frames, calls and deadlines; does not know what the messages mean."""

from memserve.wire.connection import Connection, Handler, connect, listen

__all__ = ["Connection", "Handler", "connect", "listen"]
