"""Targets as people write them; servers that are started are ended, and say why if they do not come up."""

from __future__ import annotations

import asyncio

import pytest

from memserve.bench.configurations import CONFIGURATIONS
from memserve.bench.target import Target, open_target, parse_configurations, parse_urls
from memserve.cli.serve import ServeOptions, build_config
from memserve.core.errors import ConfigError, NoInstance


def test_addresses_with_and_without_names() -> None:
    assert parse_urls("http://127.0.0.1:8000") == (Target("127.0.0.1:8000", "http://127.0.0.1:8000"),)
    assert parse_urls("a=http://h:1, b=https://h/x?y=z") == (
        Target("a", "http://h:1"),
        Target("b", "https://h/x?y=z"),
    )


@pytest.mark.parametrize("text", ["h:1", "a=h:1", "http://h,", "a=http://h:1,a=http://h:2", ""])
def test_bad_addresses_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match="--url"):
        parse_urls(text)


def test_configurations_by_name_and_of_ones_own() -> None:
    both = parse_configurations("disagg,mine=--prefill 2 --decode 1", "--kv-memory '64 MiB'")
    assert [target.name for target in both] == ["disagg", "mine"]
    assert both[0].options == (*CONFIGURATIONS["disagg"], "--kv-memory", "64 MiB")
    assert both[1].options == ("--prefill", "2", "--decode", "1", "--kv-memory", "64 MiB")


@pytest.mark.parametrize(
    ("text", "common", "named"),
    [
        ("sideways", "", "'sideways' is no configuration; accepted: colocated, "),
        ("disagg,disagg", "", "every name once"),
        ("disagg", "'", "--serve"),
        ('mine="', "", "--compare mine"),
    ],
)
def test_bad_configurations_are_named(text: str, common: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_configurations(text, common)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_configuration_is_one_that_serve_takes(name: str) -> None:
    words = CONFIGURATIONS[name]
    said = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
    names = {option: said.pop(option) for option in ("phases", "policy")}
    counts = {role: int(count) for role, count in said.items()}
    config = build_config(ServeOptions(**names, **counts), None)  # type: ignore[arg-type]
    assert config.cluster.prefill + config.cluster.decode + config.cluster.colocated == 2


@pytest.mark.processes
def test_a_server_that_cannot_start_says_why() -> None:
    async def start() -> None:
        async with open_target(Target("x", options=("--model", "/does/not/exist.gguf")), asyncio.Event()):
            raise AssertionError("it cannot have come up")

    with pytest.raises(NoInstance, match=r"x did not come up: .*/does/not/exist\.gguf"):
        asyncio.run(start())


@pytest.mark.processes
def test_a_stop_while_starting_ends_the_server() -> None:
    async def start() -> str | None:
        stop = asyncio.Event()
        stop.set()
        async with open_target(Target("x", options=("--runner", "reference")), stop) as url:
            return url

    assert asyncio.run(start()) is None
