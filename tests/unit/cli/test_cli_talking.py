"""``chat`` and ``status`` against a server with the stand-in backend."""

from __future__ import annotations

import io
import json
import socket
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from memserve.cli.app import app
from memserve.cli.client import ServerClient, ServerError, read_events
from memserve.cli.conversation import Conversation
from memserve.cli.status import show_cluster
from memserve.core.errors import PeerLost
from memserve.server.backend import (
    ClusterView,
    Health,
    InstanceView,
    LineView,
    LostInstance,
    TenantView,
    TreeView,
)
from memserve.server.stand_in import Script
from memserve.server.views import cluster_body, health_body

KEY = ("--api-key", "key")


def test_a_piped_message_is_answered_on_stdout_and_its_figures_go_to_stderr(
    runner: CliRunner, server: Any
) -> None:
    server.say("Because.")
    arguments = ["chat", "--url", server.url, "--system", "Be brief", *KEY]
    result = runner.invoke(app, arguments, input="Why?\nReally?\n")
    assert (result.exit_code, result.stdout) == (0, "Because.\n")
    assert "prompt tokens cached" in result.stderr
    (request,) = server.backend.requests
    prompt = server.tokenizer.decode(request.tokens, skip_special=False)
    assert prompt == "<s>system:Be brief</s><s>user:Why?\nReally?</s><s>assistant:"
    assert request.session


def test_nothing_piped_is_an_error(runner: CliRunner, server: Any) -> None:
    result = runner.invoke(app, ["chat", "--url", server.url, *KEY], input=" \n")
    assert result.exit_code == 1
    assert "empty" in result.stderr


def test_turns_build_on_each_other_until_reset(server: Any) -> None:
    server.say("A long enough answer.")
    out = io.StringIO()
    with ServerClient(server.url, "key") as client:
        talk = Conversation(client, "tiny", "System", 0.0, out)
        first = talk.ask("One?", clock=iter((0.0, 0.25, 2.0)).__next__)
        second = talk.ask("Two?")
        talk.reset()
        talk.ask("Three?")
    assert first == "first token after 0.25 s · 22 tokens in 2.00 s · 0 of 37 prompt tokens cached"
    assert ", 0 of" not in second
    assert "32 of" in second
    assert out.getvalue() == "A long enough answer.\n" * 3
    prompts = [server.tokenizer.decode(r.tokens, skip_special=True) for r in server.backend.requests]
    assert prompts[1] == "system:Systemuser:One?assistant:A long enough answer.user:Two?assistant:"
    assert prompts[2] == "system:Systemuser:Three?assistant:"
    sessions = [request.session for request in server.backend.requests]
    assert sessions[0] == sessions[1] != sessions[2]


def test_a_failed_turn_is_not_remembered(server: Any) -> None:
    server.backend.script = Script(failure=PeerLost("decode-0 is gone"), fail_after=2)
    with ServerClient(server.url, "key") as client:
        talk = Conversation(client, "tiny", None, 0.0, io.StringIO())
        with pytest.raises(ServerError, match="decode-0 is gone"):
            talk.ask("One?")
        assert talk.turns == []
        with pytest.raises(ServerError, match=r"404.*other"):
            Conversation(client, "other", None, 0.0, io.StringIO()).ask("One?")


COMMANDS = [
    ["chat"],
    ["status"],
    ["why", "cmpl-1"],
    ["resize", "stand-in-0", "--kv-memory", "1GiB"],
    ["role", "stand-in-0", "decode"],
]


@pytest.mark.parametrize("command", COMMANDS)
def test_without_a_server_the_message_says_how_to_start_one(runner: CliRunner, command: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    result = runner.invoke(app, [*command, "--url", f"http://127.0.0.1:{port}"], input="Hi")
    assert result.exit_code == 1
    assert "memserve serve" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_key_and_a_bad_url_are_explained(runner: CliRunner, server: Any, command: list[str]) -> None:
    refused = runner.invoke(app, [*command, "--url", server.url], input="Hi")
    assert refused.exit_code == 1
    assert "401" in refused.stderr
    bad = runner.invoke(app, [*command, "--url", "nonsense"], input="Hi")
    assert bad.exit_code == 1
    assert "nonsense" in bad.stderr


def test_resize_says_what_a_tier_will_have(runner: CliRunner, server: Any) -> None:
    asked = ["--kv-memory", "1KiB", "--host-memory", "100", "--url", server.url, *KEY]
    result = runner.invoke(app, ["resize", "stand-in-0", *asked])
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == [
        "stand-in-0 device: 64 blocks (1 KiB)",
        "stand-in-0 host: 6 blocks (96 B)",
    ]
    missing = runner.invoke(app, ["resize", "other", *asked])
    assert missing.exit_code == 1
    assert "no instance 'other'" in missing.stderr


@pytest.mark.parametrize("sizes", [[], ["--kv-memory", "much"]])
def test_resize_without_a_size_says_what_is_missing(runner: CliRunner, sizes: list[str]) -> None:
    result = runner.invoke(app, ["resize", "stand-in-0", *sizes])
    assert result.exit_code == 2
    assert "--kv-memory" in result.stderr


def test_role_says_what_an_instance_does_now(runner: CliRunner, server: Any) -> None:
    asked = ["--url", server.url, *KEY]
    for words in ("decode (was colocated)", "decode (as before)"):
        result = runner.invoke(app, ["role", "stand-in-0", "decode", *asked])
        assert (result.exit_code, result.stdout) == (0, f"stand-in-0: {words}\n")
    missing = runner.invoke(app, ["role", "other", "decode", *asked])
    assert (missing.exit_code, "no instance 'other'" in missing.stderr) == (1, True)
    bad = runner.invoke(app, ["role", "stand-in-0", "both", *asked])
    assert (bad.exit_code, "prefill, decode, colocated" in bad.stderr) == (2, True)


def test_status_as_json_is_what_the_server_says(runner: CliRunner, server: Any) -> None:
    result = runner.invoke(app, ["status", "--json", "--url", server.url, *KEY])
    body = json.loads(result.stdout)
    assert body["instances"][0]["instance"] == "stand-in-0"


def test_status_as_a_table(runner: CliRunner, server: Any) -> None:
    result = runner.invoke(app, ["status", "--url", server.url, *KEY], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "stand-in-0" in result.stdout
    assert "colocated tree" in result.stdout


def test_the_table_shows_blocks_trees_and_the_lost() -> None:
    one = InstanceView("decode-0", "decode", "ready", 3, 77, "amx", 1000, 600, 100, 250, 50, 2, 5)
    waiting = (TenantView("[a]", 1.0, 1200, 34_000, 0, 0.0), TenantView("nobody", 1.0, 0, 0, 3, 1.0))
    view = ClusterView(
        "m[x]",
        "prompt-tree",
        "pd-caching-3",
        16,
        4096,
        (one,),
        (TreeView("decode", 9, 1234),),
        line=LineView(waiting),
    )
    health = Health("degraded", "serving without prefill-1", (), (LostInstance("prefill-1", "[gone]", 1.0),))
    console = Console(file=io.StringIO(), width=200, record=True)
    for line in show_cluster(cluster_body(view), health_body(health)):
        console.print(line)
    text = console.export_text()
    for word in ("m[x]", "decode-0", "amx", "77", "1,000", "600", "100", "250", "9 nodes, 1,234 tokens"):
        assert word in text
    assert "lost prefill-1: [gone]" in text
    assert "waiting for room: [a]: 1,200 requests, 34,000 tokens" in text
    assert "nobody" not in text


def test_events_end_with_done_or_with_an_error() -> None:
    good = ["", ": comment", 'data: {"choices":[{"delta":{"content":"a"}}]}', "data: [DONE]", "data: x"]
    assert [event.text for event in read_events(good)] == ["a"]
    with pytest.raises(ServerError, match="before it was complete"):
        list(read_events(good[:3]))
    with pytest.raises(ServerError, match="no chat chunk"):
        list(read_events(["data: {"]))
