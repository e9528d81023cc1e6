"""From samples to figures, and what a run of the benchmark does when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.engine.models.tiny import tiny_weights
from peers.engines import UnknownEngine, parse_engine, recipe_for
from peers.figures import (
    Figure,
    Limits,
    Sample,
    Spread,
    another_round,
    compare,
    deadline_of,
    figures_of,
    floor_seconds,
    prefill,
    rotated,
    samples_of,
    select,
)
from peers.model_files import MODELS
from peers.protocol import Decode, Mixed, MixedTimed, Prefill, Timed
from peers.tables import Setting, as_markdown, as_text

RATE = "prefill 128: tokens/s"
GAP = "mixed: p99 between tokens, ms"


def rounds(engine: str, metric: str, *values: float) -> list[Sample]:
    return [Sample(engine, turn, metric, value) for turn, value in enumerate(values)]


def test_ratios_pair_the_rounds_and_take_the_best_peer_of_each() -> None:
    samples = [
        *rounds("memserve", RATE, 100.0, 300.0, 200.0),
        *rounds("llama", RATE, 50.0, 100.0, 250.0),
        *rounds("vllm", RATE, 80.0, 60.0, 100.0),
        *rounds("memserve:weights=int8", RATE, 1000.0, 1000.0, 1000.0),
    ]
    (row,) = compare(samples, "memserve")
    assert row.figures["memserve"] == Spread(200.0, 100.0, 300.0, 3)
    assert row.ratios["llama"] == Spread(2.0, 0.8, 3.0, 3)
    assert row.to_best == Spread(1.25, 0.8, 3.0, 3)
    assert row.ratios["memserve:weights=int8"].median == pytest.approx(0.2)


def test_a_shorter_wait_is_the_better() -> None:
    samples = [*rounds("memserve", GAP, 10.0), *rounds("llama", GAP, 30.0), *rounds("vllm", GAP, 20.0)]
    (row,) = compare(samples, "memserve")
    assert not row.higher_is_better
    assert row.to_best == Spread(2.0, 2.0, 2.0, 1)


def test_a_round_that_only_one_engine_finished_makes_no_ratio() -> None:
    samples = [
        Sample("memserve", 0, RATE, 10.0),
        Sample("memserve", 1, RATE, 20.0),
        Sample("llama", 1, RATE, 10.0),
    ]
    (row,) = compare(samples, "memserve")
    assert row.to_best == Spread(2.0, 2.0, 2.0, 1)
    (alone,) = compare(samples[:1], "memserve")
    assert alone.to_best is None
    assert alone.ratios == {}


def test_repeats_count_by_their_median_and_mixed_load_gives_all_its_numbers() -> None:
    (sample,) = samples_of(prefill(128, 3), Timed(128, [2.0, 1.0, 4.0]), "vllm", 5)
    assert sample == Sample("vllm", 5, RATE, 64.0)
    figure = Figure("mixed", Mixed(8, 256, 4, 1000, 40))
    answer = MixedTimed(0.01, 0.02, 0.03, 0.04, alone_seconds=4.0, mixed_seconds=5.0)
    found = {each.metric: each.value for each in samples_of(figure, answer, "vllm", 0)}
    assert found[GAP] == pytest.approx(40.0)
    assert found["mixed: p99 between tokens, of the idle median"] == pytest.approx(4.0)
    assert found["mixed: prefill tokens/s"] == pytest.approx(800.0)
    assert found["mixed: prefill, of alone"] == pytest.approx(0.8)


@given(st.lists(st.text(min_size=1), min_size=1, max_size=5, unique=True), st.integers(0, 20))
def test_everybody_comes_first_in_turn(names: list[str], by: int) -> None:
    assert sorted(rotated(names, by)) == sorted(names)
    assert {rotated(names, by + turn)[0] for turn in range(len(names))} == set(names)


def test_rounds_end_with_the_time() -> None:
    assert another_round(0, 3, 0.0, -5.0), "one round is always made"
    assert another_round(2, 3, 20.0, 30.0)
    assert not another_round(2, 3, 20.0, 29.0), "a third of 10 s does not fit"
    assert not another_round(3, 3, 1.0, 30.0)


def test_figures_are_selected_by_name_and_never_without_deadline() -> None:
    figures = figures_of(MODELS[0])
    assert [each.name for each in select(figures, ["prefill*"])] == [
        "prefill 128",
        "prefill 512",
        "prefill 2048",
        "prefill 4096",
    ]
    assert [each.name for each in select(figures, ["mixed", "decode b8*"])] == ["decode b8 at 256", "mixed"]
    assert select(figures, ["nothing"]) == []
    assert select(figures, []) == figures
    assert all(60 < deadline_of(each.request) < 3600 for model in MODELS for each in figures_of(model))


def test_the_floor_is_memory_for_decode_and_arithmetic_for_prefill() -> None:
    spec = tiny_weights(1).spec
    slow_memory, slow_sums = Limits(1e3, 1e18), Limits(1e18, 1e3)
    weight_bytes = 10_000
    kv_bytes = 4 * spec.kv_heads * spec.head_dim * spec.layers
    read = floor_seconds(Decode(2, 100, 1), spec, weight_bytes, slow_memory)
    assert read == pytest.approx((weight_bytes + 200 * kv_bytes) / 1e3)
    once, twice = (floor_seconds(Prefill(n), spec, weight_bytes, slow_sums) for n in (100, 200))
    assert 2 < twice / once < 4, "attention grows with the square, all else with the length"


@pytest.mark.parametrize("text", ["ollama", "llama:", "llama:kv", "llama:kv=", "llama:=f16"])
def test_an_unknown_engine_or_option_is_named(text: str) -> None:
    with pytest.raises(UnknownEngine, match=text):
        parse_engine(text)


def test_an_engine_may_take_part_twice_with_other_options() -> None:
    plain, without = parse_engine("llama"), parse_engine("llama:amx=off:kv=q8_0")
    assert without.options == {"amx": "off", "kv": "q8_0"}
    recipes = recipe_for(plain), recipe_for(without)
    assert recipes[0] is not None
    assert recipes[1] is not None
    assert recipes[0].folder != recipes[1].folder
    assert recipe_for(parse_engine("memserve:weights=int8")) is None


def test_a_refusal_is_said_where_the_figure_would_be() -> None:
    samples = [
        *rounds("memserve", RATE, 100.0, 300.0),
        *rounds("memserve", GAP, 10.0),
        *rounds("llama", GAP, 5.0),
    ]
    setting = Setting(
        "4bit",
        2,
        ("memserve", "llama", "vllm"),
        tuple(compare(samples, "memserve")),
        {RATE: Spread(400.0, 350.0, 450.0, 2)},
        {"llama": {"prefill 128": "killed by SIGSEGV"}, "vllm": {"": "cannot be installed: no wheel"}},
        {"memserve": {"ready after": "1.5 s"}},
    )
    for text in (as_text(setting), as_markdown("smollm2-135m", [setting])):
        assert "llama, prefill 128: refused: killed by SIGSEGV" in text
        assert "vllm, all figures: refused: cannot be installed: no wheel" in text
        assert text.count("refused") == 2 + 3, "two reasons, and three figures that are not there"
        assert "200 (100..300)" in text
        assert "400 (0.50)" in text
        assert "0.50" in text
        assert "ready after 1.5 s" in text
