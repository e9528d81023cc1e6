"""The ``memserve`` command: one file per command; what is slow to import is imported when it is used."""

from memserve.cli.app import main

__all__ = ["main"]
