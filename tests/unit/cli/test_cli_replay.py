"""``memserve sim --decisions`` and ``memserve replay``: the same, another policy, damage."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from memserve.cli.app import app

SMALL = ("--requests", "30", "--load", "0.8", "--colocated", "3")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("log") / "decisions"
    done = CliRunner().invoke(app, ["sim", *SMALL, "--policy", "cost", "--decisions", str(file)])
    assert done.exit_code == 0, done.output
    return file


def test_every_decision_comes_out_again(log: Path) -> None:
    done = CliRunner().invoke(app, ["replay", str(log)])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("all ")
    assert done.output.endswith("decisions come out as they were\n")


def test_the_end_of_a_log_that_was_cut_is_told(log: Path, tmp_path: Path) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    cut = tmp_path / "cut"
    cut.write_bytes(b"".join(lines[:-1]) + lines[-1][:7])
    done = CliRunner().invoke(app, ["replay", str(cut)])
    assert done.exit_code == 0, done.output
    assert f"the log ends at line {len(lines)}: 7 bytes of a line" in done.stderr
    assert "decisions come out as they were" in done.stdout


def test_another_policy_is_compared(log: Path) -> None:
    done = CliRunner().invoke(app, ["replay", str(log), "--policy", "round-robin", "--show", "1"])
    assert done.exit_code == 0, done.output
    assert "  then " in done.output
    assert "  now  " in done.output
    assert "round-robin places" in done.output.splitlines()[-1]


def test_what_does_not_come_out_is_shown(log: Path, tmp_path: Path) -> None:
    spoilt = tmp_path / "spoilt"
    spoilt.write_bytes(log.read_bytes().replace(b'"predicted_prefill":', b'"predicted_prefill":9', 1))
    done = CliRunner().invoke(app, ["replay", str(spoilt)])
    assert done.exit_code == 1
    assert "predicted_prefill: 9" in done.output
    assert "1 of " in done.output.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["replay", "/nowhere"], 1, "/nowhere cannot be read"),
        (["replay", __file__], 1, "is no decision log"),
        (["replay", __file__, "--policy", "best"], 2, "--policy is 'best'"),
        (["sim", *SMALL, "--decisions", "/tmp/nowhere-at-all/x"], 2, "cannot be written"),
        (["sim", *SMALL, "--decisions", "x"], 2, "--decisions is the log of one policy"),
    ],
)
def test_what_cannot_be_done_is_named(arguments: list[str], code: int, complaint: str) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == code, done.output
    assert complaint in done.output.replace("\n", " ")
