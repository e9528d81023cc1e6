"""Options and files to a configuration; what is wrong ends with code 2 and one line."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from memserve import __version__
from memserve.cli.app import app
from memserve.cli.screen import BarScreen, LineScreen, curl_for, open_screen
from memserve.cli.serve import ServeOptions, build_config
from memserve.cli.sizes import parse_size, show_size
from memserve.core.config import TreeSource
from memserve.core.errors import ConfigError


def test_nothing_said_means_the_defaults() -> None:
    config = build_config(ServeOptions(), None)
    assert (config.cluster.prefill, config.cluster.decode, config.cluster.colocated) == (1, 1, 0)
    assert config.engine.phases == "pd-caching-3"


@pytest.mark.parametrize(
    ("said", "counts"),
    [
        (ServeOptions(colocated=2), (0, 0, 2)),
        (ServeOptions(colocated=1, prefill=1), (1, 1, 1)),
        (ServeOptions(colocated=1, prefill=2, decode=3), (2, 3, 1)),
        (ServeOptions(prefill=4), (4, 1, 0)),
        (ServeOptions(colocated=0), (1, 1, 0)),
    ],
)
def test_colocated_alone_means_no_others(said: ServeOptions, counts: tuple[int, int, int]) -> None:
    cluster = build_config(said, None).cluster
    assert (cluster.prefill, cluster.decode, cluster.colocated) == counts


def test_options_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "memserve.toml"
    file.write_text('[server]\nport = 9000\nhost = "0.0.0.0"\n[pool]\nmemory = 8388608\n')
    config = build_config(ServeOptions(port=9001, kv_memory="2GiB", threads=1, weights="int8"), file)
    assert (config.server.port, config.server.host) == (9001, "0.0.0.0")
    assert build_config(ServeOptions(trees=TreeSource.TTL), file).scheduler.trees is TreeSource.TTL
    assert (config.pool.memory, config.engine.threads, config.engine.weights) == (2 << 30, 1, "int8")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--phases", "sideways"], "engine.phases"),
        (["--policy", "best"], "server.policy"),
        (["--runner", "gpu"], "model.runner"),
        (["--weights", "int3"], "engine.weights"),
        (["--speculative-method", "oracle"], "engine.speculative_method"),
        (["--num-speculative-tokens", "0"], "engine.num_speculative_tokens"),
        (["--kv-cache-dtype", "int4"], "pool.kv_cache_dtype"),
        (["--prefill", "0"], "cluster.prefill/decode"),
        (["--colocated", "-1"], "cluster.colocated"),
        (["--port", "70000"], "server.port"),
        (["--kv-memory", "lots"], "--kv-memory"),
        (["--kv-memory", "10"], "pool.memory"),
        (["--threads", "-1"], "engine.threads"),
        (["--target-tpot", "-1"], "engine.target_tpot"),
        (["--target-tpot", "nan"], "engine.target_tpot"),
        (["--config", "/does/not/exist.toml"], "/does/not/exist.toml"),
        (["--port", "0", "--model", "/does/not/exist.gguf"], "/does/not/exist.gguf"),
    ],
)
def test_bad_values_end_with_two_and_one_line(runner: CliRunner, arguments: list[str], named: str) -> None:
    result = runner.invoke(app, ["serve", *arguments])
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("memserve: ")]
    assert len(lines) == 1
    assert named in lines[0]
    assert "Traceback" not in result.output


def test_a_bad_file_is_named_with_its_field(runner: CliRunner, tmp_path: Path) -> None:
    file = tmp_path / "memserve.toml"
    for text, named in (("[server]\nprot = 1\n", "prot"), ("[server", "TOML"), ("\xff", "TOML")):
        file.write_text(text, encoding="latin-1")
        result = runner.invoke(app, ["serve", "--config", str(file)])
        assert result.exit_code == 2
        assert str(file) in result.stderr
        assert named in result.stderr or "utf-8" in result.stderr


def test_words_for_numbers_are_refused_by_name(runner: CliRunner) -> None:
    result = runner.invoke(app, ["serve", "--port", "http"])
    assert result.exit_code == 2
    assert "--port" in result.stderr


def test_the_pace_is_an_option() -> None:
    assert build_config(ServeOptions(), None).engine.target_tpot == 0.1
    assert build_config(ServeOptions(target_tpot=0.0), None).engine.target_tpot == 0


def test_the_api_key_comes_from_the_environment() -> None:
    assert build_config(ServeOptions(api_key="k"), None).server.api_key == "k"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("123", 123),
        ("1k", 1024),
        ("512MiB", 512 << 20),
        ("2G", 2 << 30),
        ("1.5 GB", 3 << 29),
        ("1tib", 1 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--x") == size


@pytest.mark.parametrize("text", ["", "-1", "GiB", "1 PiB", "1..5G", "0x10", "1G5"])
def test_bad_sizes_name_the_field(text: str) -> None:
    with pytest.raises(ConfigError, match="--x"):
        parse_size(text, "--x")


def test_shown_sizes_can_be_read_again() -> None:
    for size in (0, 512, 3 << 19, 5 << 30, 1 << 42):
        assert parse_size(show_size(size), "x") == size


def test_lines_once_per_stage_and_a_curl_that_is_valid() -> None:
    console, out = Console(file=io.StringIO(), width=40), Console(file=io.StringIO(), width=40)
    screen = open_screen(console, out)
    assert isinstance(screen, LineScreen)
    for fraction in (0.0, 0.5, 1.0):
        screen.loading("prefill-0", "reading weights", fraction)
    screen.ready("http://0.0.0.0:8000", "it's [bold]", ("2 instances",))
    screen.lost("decode-0", "killed [by] SIGKILL")
    screen.stopped()
    assert text_of(console).splitlines() == [
        "prefill-0: reading weights",
        "2 instances",
        "lost decode-0: killed [by] SIGKILL",
        "stopped",
    ]
    (ready,) = text_of(out).splitlines()
    words = shlex.split(ready[ready.index("curl ") :])
    assert words[1] == "http://127.0.0.1:8000/v1/chat/completions"
    assert json.loads(words[-1])["model"] == "it's [bold]"


def test_bars_on_a_terminal_end_with_the_ready_line() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    out = Console(file=io.StringIO())
    screen = open_screen(console, out)
    assert isinstance(screen, BarScreen)
    screen.loading("decode-0", "packing weights", 0.5)
    screen.ready("http://127.0.0.1:8000", "m")
    screen.lost("decode-0", "gone")
    screen.stopped()
    assert curl_for("http://127.0.0.1:8000", "m") in text_of(out)
    assert "lost decode-0: gone" in text_of(console)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_version_and_help(runner: CliRunner) -> None:
    for arguments in (["version"], ["--version"]):
        assert runner.invoke(app, arguments).stdout == f"memserve {__version__}\n"
    shown = runner.invoke(app, ["--help"])
    assert shown.exit_code == 0
    assert all(name in shown.stdout for name in ("serve", "chat", "status", "doctor", "version"))
    assert "instance " not in shown.stdout
    for name in ("serve", "chat", "status", "doctor"):
        assert runner.invoke(app, [name, "--help"]).exit_code == 0


def test_the_command_line_loads_nothing_heavy_before_it_knows_what_to_do() -> None:
    code = "import sys, memserve.cli; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    heavy = {"numpy", "httpx", "fastapi", "starlette", "uvicorn", "tokenizers", "jinja2", "gguf", "asyncio"}
    assert not heavy & set(done.stdout.split())
