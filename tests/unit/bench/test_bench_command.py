"""``memserve bench`` as a command: options to files and exit codes, and Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memserve.cli.app import app
from memserve.core.errors import RequestFailed
from memserve.server.stand_in import Script
from stand_in_server import DEADLINE, Server

SMALL = ("--sessions", "2", "--turns", "2", "--prompt-tokens", "60", "--turn-tokens", "20", "--think", "0")


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


def test_a_benchmark_is_shown_and_written(runner: CliRunner, server: Server, tmp_path: Path) -> None:
    files = [tmp_path / "r.json", tmp_path / "r.html"]
    urls = f"a={server.url},b={server.url}"
    arguments = ["--url", urls, *SMALL, "--rounds", "2", "--json", str(files[0]), "--html", str(files[1])]
    result = runner.invoke(app, ["bench", *arguments, "--slo-ttft", "60"])
    assert result.exit_code == 0, result.output
    assert "TTFT mean, ms" in result.stdout
    assert "b: round 2 of 2, 4 turns" in result.stderr
    report = json.loads(files[0].read_text())
    assert [entry["name"] for entry in report["entries"]] == ["a", "b"]
    assert [len(entry["rounds"]) for entry in report["entries"]] == [2, 2]
    assert report["entries"][0]["figures"]["failed"] == 0
    assert report["entries"][0]["figures"]["sources"]["local"] > 0
    assert report["entries"][0]["figures"]["goodput"] == report["entries"][0]["figures"]["turns_per_second"]
    assert report["entries"][1]["against_first"]["equal_answers"] == 1.0
    assert "<svg" in files[1].read_text()


def test_salts_are_new_each_time_unless_given(runner: CliRunner, server: Server, tmp_path: Path) -> None:
    file, salts = tmp_path / "r.json", []
    for more in ([], [], ["--salt", "mine"]):
        runner.invoke(app, ["bench", "--url", server.url, *SMALL, "--json", str(file), *more])
        salts.append(json.loads(file.read_text())["setting"]["salt"])
    assert salts[0] != salts[1]
    assert salts[2] == "mine"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--url", "http://h", "--compare", "disagg"], "--url and --compare"),
        (["--serve", "--threads 1"], "--serve"),
        (["--compare", "best"], "'best' is no configuration"),
        (["--url", "h:80"], "--url 'h:80'"),
        (["--workload", "poems", "--data", "."], "--workload is 'poems'"),
        (["--workload", "loogle"], "--data DIR"),
        (["--workload", "mooncake"], "--trace FILE"),
        (["--workload", "mooncake", "--trace", "/does/not/exist"], "/does/not/exist"),
        (["--workload", "sharegpt", "--data", "/does/not/exist"], "/does/not/exist"),
        (["--rate", "1", "--concurrency", "1"], "--rate and --concurrency"),
        (["--rate", "-1"], "--rate is -1"),
        (["--endpoint", "mail"], "--endpoint is 'mail'"),
        (["--endpoint", "tokens"], "--endpoint tokens"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--timeout", "0"], "--timeout is 0"),
        (["--duration", "-1"], "--duration is -1"),
        (["--think", "-1"], "--think is -1"),
        (["--slo-ttft", "-1"], "--slo-ttft is -1"),
        (["--seed", "-1"], "--seed is -1"),
        (["--json", "/does/not/exist/r.json"], "/does/not/exist/r.json"),
        (["--turns", "1000"], "grows to"),
    ],
)
def test_bad_values_end_with_two_and_one_line(runner: CliRunner, arguments: list[str], named: str) -> None:
    result = runner.invoke(app, ["bench", *arguments])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("memserve: ")
    assert named in line


def test_a_server_that_is_not_there_ends_with_one(runner: CliRunner) -> None:
    result = runner.invoke(app, ["bench", "--url", "http://127.0.0.1:9"])
    assert result.exit_code == 1
    assert "no server answers at http://127.0.0.1:9" in result.stderr


def test_if_no_turn_is_answered_that_is_a_failure(runner: CliRunner, server: Server) -> None:
    # The first small request has four tokens and is answered.
    server.backend.script = Script(failure=RequestFailed("the kernel broke"), fail_after=4)
    result = runner.invoke(app, ["bench", "--url", server.url, *SMALL])
    assert result.exit_code == 1
    assert "2 failed: in mid-stream" in result.stdout
    assert "no turn was answered" in result.stderr


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "memserve.cli", "bench", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.processes
def test_an_interrupt_ends_it_and_still_reports(server: Server, tmp_path: Path) -> None:
    server.backend.script, file = Script(stall_after=4), tmp_path / "r.json"
    with running("--url", server.url, *SMALL, "--json", str(file)) as process:
        deadline = time.monotonic() + DEADLINE
        while len(server.backend.running) < 2:
            assert time.monotonic() < deadline, "nothing was asked"
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        shown, said = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "interrupted" in shown
    assert "2 turns cut off, 2 never sent" in shown
    assert json.loads(file.read_text())["interrupted"] is True
    deadline = time.monotonic() + DEADLINE
    while server.backend.running:
        assert time.monotonic() < deadline, "what was in flight was not cancelled"
        time.sleep(0.01)
