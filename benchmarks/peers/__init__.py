"""Engines under one yardstick: each runs in a process and an environment of its own behind one protocol.

``drive_*`` modules run inside those environments: they and what they import (``protocol``, ``stepping``,
``serving``) need nothing but the standard library and the engine itself.
"""
