"""``doctor``: this machine, and machines made of files."""

from __future__ import annotations

import socket
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from memserve.cli.app import app
from memserve.cli.machine import (
    Finding,
    Verdict,
    check_cores,
    check_memory,
    check_port,
    examine_machine,
)
from memserve.cluster.host import available_memory, count_cores
from memserve.core.config import Config, ModelConfig, ServerConfig

GIB = 1 << 30


def make_machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def meminfo(available: int) -> str:
    return f"MemTotal:       {99 * GIB // 1024} kB\nMemAvailable:   {available // 1024} kB\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/meminfo": meminfo(8 * GIB)}, 8 * GIB),
        ({"proc/meminfo": meminfo(8 * GIB), "sys/fs/cgroup/memory.max": "max\n"}, 8 * GIB),
        (
            {
                "proc/meminfo": meminfo(8 * GIB),
                "sys/fs/cgroup/memory.max": f"{3 * GIB}\n",
                "sys/fs/cgroup/memory.current": f"{GIB}\n",
            },
            2 * GIB,
        ),
        (
            {
                "proc/meminfo": meminfo(8 * GIB),
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
            },
            4 * GIB,
        ),
        (
            {
                "proc/meminfo": meminfo(8 * GIB),
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            8 * GIB,
        ),
    ],
)
def test_memory_is_what_kernel_and_cgroup_leave(
    tmp_path: Path, files: dict[str, str], expected: int | None
) -> None:
    assert available_memory(make_machine(tmp_path, files)) == expected


def test_little_memory_comes_with_a_remedy(tmp_path: Path) -> None:
    little = check_memory(Config(), make_machine(tmp_path, {"proc/meminfo": meminfo(GIB)}))
    assert little.verdict is Verdict.LESS
    assert "--kv-memory" in little.remedy
    plenty = check_memory(Config(), make_machine(tmp_path, {"proc/meminfo": meminfo(64 * GIB)}))
    assert plenty.verdict is Verdict.GOOD


def test_a_cpu_quota_counts(tmp_path: Path) -> None:
    unlimited = make_machine(tmp_path, {"sys/fs/cgroup/cpu.max": "max 100000\n"})
    assert count_cores(unlimited) >= 1
    one = make_machine(tmp_path, {"sys/fs/cgroup/cpu.max": "100000 100000\n"})
    assert count_cores(one) == 1
    finding = check_cores(one)
    assert finding.verdict is Verdict.LESS
    assert "--colocated 1" in finding.remedy


def test_a_taken_port_is_a_note() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = msgspec.structs.replace(Config(), server=ServerConfig(port=taken.getsockname()[1]))
        assert check_port(config).verdict is Verdict.LESS
    assert check_port(config).verdict is Verdict.GOOD


def test_a_missing_model_is_a_note_that_says_how_to_get_it() -> None:
    config = msgspec.structs.replace(Config(), model=ModelConfig(model="/does/not/exist.gguf"))
    found = {finding.subject: finding for finding in examine_machine(config)}
    assert found["model"].verdict is Verdict.LESS
    assert "/does/not/exist.gguf" in found["model"].text
    assert found["model"].remedy


def test_whatever_is_not_good_has_a_remedy(tmp_path: Path) -> None:
    findings: list[Finding] = list(examine_machine(Config()))
    assert {"cores", "memory", "kernels", "shared memory", "sockets", "model"} <= {
        f.subject for f in findings
    }
    assert all(finding.remedy for finding in findings if finding.verdict is not Verdict.GOOD)


def test_the_command_says_what_it_found(runner: CliRunner) -> None:
    result = runner.invoke(app, ["doctor"], env={"COLUMNS": "160"})
    impossible = any(finding.verdict is Verdict.BAD for finding in examine_machine(Config()))
    assert result.exit_code == int(impossible)
    assert "cores" in result.stdout
    assert ("memserve serve" in result.stdout) or impossible
