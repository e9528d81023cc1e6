"""Makes the environment of an engine once, from a recipe, below a cache folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from peers.engines import BENCHMARKS, Recipe

INSTALL_SECONDS = 3600.0
_STAMP = "installed.txt"
_LOG = "install.log"


class InstallError(Exception):
    """An environment cannot be made; the text has the last line that the installer said."""


def install(recipe: Recipe, folder: Path) -> Path:
    """The interpreter of the environment, which is made anew whenever the recipe has changed.

    Raises ``InstallError``.
    """
    home = folder / recipe.folder
    python = home / "venv" / "bin" / "python"
    stamp = home / _STAMP
    wanted = f"{recipe}\n{sys.version}\n"
    if stamp.exists() and stamp.read_text() == wanted and python.exists():
        return python
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    print(f"installing {recipe.folder} (see {home / _LOG})", flush=True)
    _Installer(recipe, home, python).run()
    stamp.write_text(wanted)
    return python


class _Installer:
    def __init__(self, recipe: Recipe, home: Path, python: Path) -> None:
        self._recipe = recipe
        self._home = home
        self._python = python
        self._deadline = time.monotonic() + INSTALL_SECONDS
        self._environment = {**os.environ, **dict(recipe.build_environment), "PYTHONPATH": str(BENCHMARKS)}

    def run(self) -> None:
        recipe = self._recipe
        self._call([sys.executable, "-m", "venv", str(self._home / "venv")])
        constraints = self._home / "constraints.txt"
        constraints.write_text("".join(f"{line}\n" for line in recipe.constraints))
        for step in recipe.steps:
            self._pip(*step, "--constraint", str(constraints))
        if recipe.requirements_of:
            listing = [str(self._python), "-m", "peers.list_requirements", recipe.requirements_of]
            wanted = self._home / "requirements.txt"
            wanted.write_text(self._call([*listing, *recipe.leave_out]))
            self._pip("--requirement", str(wanted), "--constraint", str(constraints))

    def _pip(self, *arguments: str) -> None:
        self._call([str(self._python), "-m", "pip", "install", *arguments])

    def _call(self, command: Sequence[str]) -> str:
        with (self._home / _LOG).open("a") as log:
            print("$", *command, file=log, flush=True)
            try:
                done = subprocess.run(
                    command,
                    env=self._environment,
                    cwd=self._home,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    timeout=max(1.0, self._deadline - time.monotonic()),
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                raise InstallError(f"not done within {INSTALL_SECONDS:.0f} s") from error
            log.write(done.stdout)
        if done.returncode:
            said = [line for line in done.stdout.splitlines() if line.strip()]
            raise InstallError(said[-1].strip() if said else f"exit code {done.returncode}")
        return done.stdout
