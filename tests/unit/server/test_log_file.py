"""The decision log's file: complete lines up to a size; a disk that fails ends the log and nothing else."""

from __future__ import annotations

import resource
import signal
import stat
from pathlib import Path

import pytest

from memserve.core.clock import VirtualClock
from memserve.core.errors import ConfigError
from memserve.server.log_file import LogFile


def test_lines_are_there_at_once_and_only_for_the_owner(tmp_path: Path) -> None:
    path = tmp_path / "decisions"
    path.write_text("of another run")
    path.chmod(0o644)
    file = LogFile(path, 1000, VirtualClock())
    file.write(b"one\n")
    file.write(b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    file.close()
    file.close()
    fresh = tmp_path / "fresh"
    LogFile(fresh, 1000, VirtualClock()).close()
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o600


def test_a_full_log_says_so_and_takes_no_more(tmp_path: Path) -> None:
    path = tmp_path / "decisions"
    file = LogFile(path, 10, VirtualClock(3.0))
    for line in (b"12345678\n", b"too long\n", b"x\n"):
        file.write(line)
    first, last = path.read_bytes().splitlines()
    assert first == b"12345678"
    assert last.startswith(b'{"what":"closed","at":3.0,"reason":"scheduler.decision_log_bytes are full')
    file.close()


def test_no_room_for_the_last_word_either() -> None:
    file = LogFile(Path("/dev/full"), 2, VirtualClock())
    file.write(b"one\n")
    file.close()


def test_nothing_follows_a_piece_of_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "decisions"
    file = LogFile(path, 1000, VirtualClock())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        for line in (b"12345678\n", b"in pieces\n"):
            file.write(line)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, kept)
    assert path.read_bytes() == b"12345678\ni"
    file.write(b"there is room again\n")
    file.close()
    assert path.read_bytes() == b"12345678\ni"
    assert "the disk is full" in caplog.text


def test_a_disk_that_is_full_ends_the_log() -> None:
    file = LogFile(Path("/dev/full"), 1000, VirtualClock())
    file.write(b"one\n")
    file.write(b"two\n")
    file.close()


def test_no_place_to_write_to_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"scheduler.decision_log: .*/nowhere/x cannot be written: No such"):
        LogFile(tmp_path / "nowhere" / "x", 1000, VirtualClock())
