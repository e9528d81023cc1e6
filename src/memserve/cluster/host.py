"""What this host has for instances: cores and memory, as the kernel and the cgroup allow.

``root`` stands for ``/`` so that tests can show any machine.
"""

from __future__ import annotations

import os
from pathlib import Path

_NO_LIMIT = 1 << 60


def count_cores(root: Path = Path("/")) -> int:
    """Cores this process may use: its affinity, cut by the cgroup's CPU quota."""
    cores = len(os.sched_getaffinity(0))
    quota, _, period = _read(root / "sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can still be used: the kernel's estimate, cut by the cgroup's limit."""
    limits = [_meminfo(root, "MemAvailable")]
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        ceiling = _read_number(root / "sys/fs/cgroup" / limit)
        if ceiling is not None and ceiling < _NO_LIMIT:
            limits.append(ceiling - (_read_number(root / "sys/fs/cgroup" / used) or 0))
    known = [limit for limit in limits if limit is not None]
    return min(known, default=None)


def processor_name(root: Path = Path("/")) -> str:
    """What the processor calls itself; empty where nobody says."""
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, name = line.partition(":")
        if key.strip() == "model name":
            return name.strip()
    return ""


def _meminfo(root: Path, name: str) -> int | None:
    for line in _read(root / "proc/meminfo").splitlines():
        key, _, rest = line.partition(":")
        if key == name:
            return int(rest.split()[0]) * 1024
    return None


def _read_number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
