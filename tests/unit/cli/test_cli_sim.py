"""``memserve sim`` and ``memserve plan`` as commands: options to tables, files and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memserve.cli.app import app

SMALL = ("--requests", "6", "--prompt-tokens", "1024", "--speed", "h100-8b")


def test_policies_are_compared_and_written(runner: CliRunner, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.json", "b.json", "a.html")]
    cluster = ("--prefill", "1", "--decode", "2", "--policy", "cost,round-robin", "--kill", "decode-1@1+2")
    for file in files[:2]:
        arguments = [*SMALL, *cluster, "--json", str(file), "--report", str(files[2])]
        shown = runner.invoke(app, ["sim", *arguments])
        assert shown.exit_code == 0, shown.output
    assert "1P2D" in shown.stdout
    assert "TTFT p99, s" in shown.stdout
    assert "36 turns simulated" in shown.stdout
    assert files[0].read_bytes() == files[1].read_bytes()
    report = json.loads(files[0].read_text())
    assert [entry["name"] for entry in report["entries"]] == ["cost", "round-robin"]
    assert "<svg" in files[2].read_text()


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Sixty requests of 4,096 tokens, four per second: more than one instance of a 70 B model gets done."""
    lines = [
        json.dumps(
            {
                "timestamp": n * 250,
                "input_length": 4096,
                "output_length": 20,
                "hash_ids": list(range(n * 8, n * 8 + 8)),
            }
        )
        for n in range(60)
    ]
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(lines))
    return file


def test_a_plan_is_found(runner: CliRunner, trace: Path) -> None:
    shown = runner.invoke(app, ["plan", "--trace", str(trace), "--slo-ttft", "2", "--slo-tpot", "0.2"])
    assert shown.exit_code == 0, shown.output
    assert "1C " in shown.stdout
    assert "is the smallest that was found" in shown.stdout


def test_a_plan_that_nothing_meets_says_so(runner: CliRunner, trace: Path) -> None:
    arguments = ["--trace", str(trace), "--slo-ttft", "0.1", "--slo-tpot", "0.2", "--max-instances", "4"]
    shown = runner.invoke(app, ["plan", *arguments])
    assert shown.exit_code == 1
    assert "no cluster of up to 4 instances" in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--policy", "best"], "--policy"),
        (["--prefill", "2"], "--decode"),
        (["--speed", "tpu"], "--speed"),
        (["--speed", "h100-8b", "--from", "http://h"], "--from"),
        (["--kill", "prefill-9@3"], "prefill-9"),
        (["--kill", "soon"], "--kill"),
        (["--role", "colocated-0=boss@3"], "--role"),
        (["--load", "1", "--rate", "2"], "--load"),
        (["--requests", "0"], "--requests"),
        (["--kv-tokens", "3"], "--kv-tokens"),
        (["--workload", "sharegpt"], "--data"),
        (["--trace", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--json", "/nowhere/at/all.json"], "cannot be written"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(runner: CliRunner, arguments: list[str], named: str) -> None:
    refused = runner.invoke(app, ["sim", *SMALL[:4], *arguments])
    assert refused.exit_code == 2, refused.output
    assert named in refused.stderr


def test_a_plan_needs_arrivals(runner: CliRunner) -> None:
    refused = runner.invoke(app, ["plan", *SMALL, "--slo-ttft", "1", "--slo-tpot", "1"])
    assert refused.exit_code == 2
    assert "--rate" in refused.stderr


def test_a_server_that_is_not_there_is_said_so(runner: CliRunner) -> None:
    refused = runner.invoke(app, ["sim", "--from", "http://127.0.0.1:9"])
    assert refused.exit_code == 1
    assert "no server answers" in refused.stderr
