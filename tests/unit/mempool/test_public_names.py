"""What a stranger imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

import memserve
from memserve import mempool


def test_the_pool_is_one_import_away() -> None:
    assert memserve.MemPool is mempool.MemPool
    assert all(hasattr(mempool, name) for name in mempool.__all__)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="NoSuchThing"):
        _ = memserve.NoSuchThing


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = "import sys, memserve; print('numpy' in sys.modules or 'memserve._native' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
