"""From workloads and profiles to trials: prompts, prices, sessions, and reports that are the same twice."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from memserve.bench.content import Run, Text, make_runs
from memserve.bench.statistics import Slo
from memserve.bench.synthetic import Shape, make_synthetic
from memserve.bench.timeline import Pace
from memserve.bench.trace import TraceLine, make_replay
from memserve.bench.workload import Message
from memserve.core.errors import ConfigError
from memserve.core.types import InstanceId, Role, StepPrices
from memserve.server.views import ClusterBody, InstanceBlocks, InstanceBody
from memserve.sim.page import render_page
from memserve.sim.prompts import content_tokens, count_tokens, prompt_lengths, tokens_of
from memserve.sim.report import encode_report, make_report, make_rows
from memserve.sim.site import Loss, RoleChange, Site, parse_loss, parse_role_change
from memserve.sim.speeds import PROFILES, Profile, profile_by_name, profile_of_cluster
from memserve.sim.trial import Load, rate_of, run_trial

CONTEXT = 1 << 17
PROFILE = PROFILES["h100-8b"]


def site(prefill: int = 0, decode: int = 0, colocated: int = 0, profile: Profile = PROFILE) -> Site:
    return Site(prefill, decode, colocated, profile.speed, profile.kv_tokens // 16, profile.wire)


def chats(sessions: int = 12) -> Load:
    workload = make_synthetic(Shape(sessions, turns=3, prompt=2048), CONTEXT, seed=1)
    return Load(workload, Pace(rate=2.0), seed=1)


# --- prompts ---


def test_equal_content_is_equal_tokens_and_as_many_as_are_counted() -> None:
    content = (*make_runs(7, 1200), Text("a question, asked"), Run(9, 40))
    tokens = content_tokens(content)
    assert tokens.dtype == np.int32
    assert len(tokens) == count_tokens(content) == 1200 + 5 + 40
    assert (content_tokens(content[:3]) == tokens[:1200]).all()
    assert (content_tokens(make_runs(8, 100)) != content_tokens(make_runs(7, 100))).any()
    assert tokens.min() >= 0


def test_runs_that_are_cut_in_the_middle_keep_their_beginnings() -> None:
    short = content_tokens((Run(1, 10), Run(2, 512), Run(3, 5)))
    assert (short[:10] == content_tokens((Run(1, 512),))[:10]).all()
    assert (short[10:522] == content_tokens((Run(2, 512),))).all()
    assert len(content_tokens(())) == 0


def test_a_prompt_contains_what_was_answered_before() -> None:
    load = chats(1)
    trial = run_trial(load, site(colocated=1), "cost")
    first, second, third = trial.measured.records
    assert [record.prompt_tokens for record in trial.measured.records] == prompt_lengths(load.workload)
    for earlier, later in ((first, second), (second, third)):
        assert later.due > earlier.ended
        whole = earlier.prompt_tokens + earlier.output_tokens - 1
        assert later.sources.local == whole // 16 * 16


def test_messages_are_put_together() -> None:
    messages = (Message("system", (Run(1, 16),)), Message("user", (Text("hello"),)))
    assert len(tokens_of(messages)) == 18


# --- profiles ---


def test_a_roofline_is_what_its_data_sheet_says() -> None:
    prices = PROFILES["h100x8-70b"].speed.prices
    assert prices.token == pytest.approx(2 * 70.6e9 / (4 * 989e12))
    assert prices.step == pytest.approx(2 * 70.6e9 / (4 * 3.35e12))
    assert prices.row_context == pytest.approx(327_680 / (4 * 3.35e12))


FILE = {
    "step": 0.02,
    "row": 1e-4,
    "row_context": 1e-8,
    "token": 1e-4,
    "token_context": 1e-9,
    "kv_tokens": 9999,
}


def test_prices_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({**FILE, "step_tokens": 256, "bandwidth": 1e9}))
    profile = profile_by_name(str(file))
    assert (profile.name, profile.kv_tokens, profile.speed.step_tokens) == ("mine", 9999, 256)
    assert (profile.speed.prices.token, profile.wire.bandwidth) == (1e-4, 1e9)


@pytest.mark.parametrize(
    "content", ["{}", "no JSON", json.dumps({**FILE, "tokn": 1}), json.dumps({**FILE, "step": 0})]
)
def test_files_that_are_none_are_refused_by_name(tmp_path: Path, content: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"mine\.json"):
        profile_by_name(str(file))


def test_unknown_profiles_are_refused() -> None:
    with pytest.raises(ConfigError, match="a800x8-70b"):
        profile_by_name("tpu")
    with pytest.raises(ConfigError, match="cannot be read"):
        profile_by_name("nowhere.json")


def cluster(*prices: dict[str, float] | None) -> ClusterBody:
    blocks = InstanceBlocks(100, 100, 0, 0, 0)
    bodies = tuple(
        InstanceBody(f"c-{n}", "colocated", "ready", 1, 1, "", blocks, 0, 0, 0, {}, one)
        for n, one in enumerate(prices)
    )
    return ClusterBody("m", "cost", "colocated", 16, 1600, bodies, ())


def test_a_server_s_prices_are_the_median_of_its_instances() -> None:
    known = {key: FILE[key] for key in ("step", "row", "row_context", "token", "token_context")}
    known["proposed"] = 0.0
    body = cluster(known, None, {**known, "token": 3e-4}, {**known, "token": 9e-4})
    profile = profile_of_cluster(body, "http://h")
    assert (profile.speed.prices.token, profile.kv_tokens, profile.wire.bytes_per_token) == (3e-4, 1600, 100)
    with pytest.raises(ConfigError, match="send it some requests"):
        profile_of_cluster(cluster(None), "http://h")


def test_instances_that_only_decode_have_prices_of_their_own() -> None:
    known = dict.fromkeys(StepPrices.__struct_fields__, 1e-3)
    body = cluster({**known, "token": 2e-4}, {**known, "token": 7e-4})
    roles = ("prefill", "decode")
    apart = [replace(one, role=role) for one, role in zip(body.instances, roles, strict=True)]
    profile = profile_of_cluster(replace(body, instances=tuple(apart)), "http://h")
    where = Site(1, 1, 1, profile.speed, 100, profile.wire, profile.decode_speed)
    tokens = {role: where.speed_of(role).prices.token for role in Role}
    assert tokens == {Role.PREFILL: 2e-4, Role.DECODE: 7e-4, Role.COLOCATED: 2e-4}
    assert dataclasses.replace(where, decode_speed=None).speed_of(Role.DECODE) == where.speed


# --- trials ---


def test_a_load_of_1_is_what_the_prefilling_instances_could_do() -> None:
    lines = [TraceLine(float(n), 8192, 8, [n * 16 + k for k in range(16)]) for n in range(20)]
    workload = make_replay(lines, CONTEXT)
    one = rate_of(workload, site(colocated=1), 1.0)
    seconds = 1 / one
    (record, *_) = run_trial(Load(workload, Pace(rate=1e-3)), site(colocated=1), "cost").measured.records
    assert record.ttft == pytest.approx(seconds)
    assert rate_of(workload, site(2, 5, 1), 0.5) == pytest.approx(1.5 * one)
    with pytest.raises(ConfigError, match="--load"):
        rate_of(workload, site(colocated=1), 0.0)


CHANGES = (Loss(InstanceId("prefill-0"), 2.0, 3.0), RoleChange(InstanceId("decode-1"), Role.COLOCATED, 4.0))


def test_equal_trials_give_equal_reports() -> None:
    load, where, slo = chats(), site(2, 2), Slo(1.0, 0.1)
    reports = [
        make_report(
            load,
            where,
            PROFILE,
            CHANGES,
            slo,
            [run_trial(load, where, name, changes=CHANGES) for name in ("cost", "round-robin")],
        )
        for _ in range(2)
    ]
    assert encode_report(reports[0]) == encode_report(reports[1])
    cost = reports[0].entries[0]
    assert (cost.figures.turns, cost.figures.failed, cost.figures.inexact) == (36, 0, 0)
    assert 0 < cost.utilization <= 1
    assert 0 < cost.good <= 1
    assert {row.name for row in make_rows(reports[0])} >= {"TTFT mean, s", "turns that kept the SLO"}
    page = render_page(reports[0])
    assert page.count("<svg") == 7
    assert "prefill-0 is lost and is back 3 s later" in page


def test_other_seeds_come_at_other_times() -> None:
    load = chats()
    trials = [run_trial(Load(load.workload, load.pace, seed), site(colocated=2), "cost") for seed in (1, 2)]
    assert trials[0].measured.records[0].due != trials[1].measured.records[0].due


def test_a_trial_can_be_given_up() -> None:
    trial = run_trial(chats(), site(colocated=1), "cost", give_up=lambda: True)
    assert trial.stopped
    assert len(trial.measured.records) == 1


@pytest.mark.parametrize(
    ("text", "loss"),
    [("prefill-0@60", Loss(InstanceId("prefill-0"), 60.0)), ("d@1.5+30", Loss(InstanceId("d"), 1.5, 30.0))],
)
def test_losses_are_read(text: str, loss: Loss) -> None:
    assert parse_loss(text) == loss


def test_role_changes_are_read() -> None:
    assert parse_role_change("d=prefill@2") == RoleChange(InstanceId("d"), Role.PREFILL, 2.0)


@pytest.mark.parametrize("text", ["d", "d@", "@3", "d@-1", "d@3+"])
def test_what_is_no_loss_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--kill"):
        parse_loss(text)


@pytest.mark.parametrize("text", ["d=prefill", "d=boss@3", "d@3"])
def test_what_is_no_role_change_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--role"):
        parse_role_change(text)
