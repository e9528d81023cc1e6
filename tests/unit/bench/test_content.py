"""Made-up tokens are the same everywhere and always."""

from __future__ import annotations

import numpy as np
import pytest

from memserve.bench.content import (
    Run,
    Text,
    draw_exponential,
    draw_uniform,
    make_runs,
    render_text,
    render_tokens,
    run_tokens,
    splitmix64,
)

MASK = (1 << 64) - 1


def splitmix_by_hand(value: int) -> int:
    mixed = (value + 0x9E3779B97F4A7C15) & MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
    return mixed ^ (mixed >> 31)


def test_splitmix_is_the_published_one() -> None:
    values = [0, 1, 511, 512, 1 << 40, MASK]
    assert splitmix64(np.array(values, np.uint64)).tolist() == [splitmix_by_hand(one) for one in values]
    # The first output of the reference implementation for seed 0.
    assert splitmix_by_hand(0) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("key", [0, 3, 5_000_000, 1 << 41])
def test_a_runs_tokens_follow_the_formula(key: int) -> None:
    tokens = run_tokens(Run(key, 20), 49152)
    assert tokens == [splitmix_by_hand((key * 512 + at) & MASK) % 49152 for at in range(20)]


def test_a_shorter_run_is_the_longer_ones_beginning() -> None:
    assert run_tokens(Run(9, 100), 1000) == run_tokens(Run(9, 512), 1000)[:100]
    assert render_text((Run(9, 512),)).startswith(render_text((Run(9, 100),)))


def test_runs_have_the_length_asked_for() -> None:
    assert [run.tokens for run in make_runs(5, 1100) if isinstance(run, Run)] == [512, 512, 76]
    assert (
        render_tokens(make_runs(5, 1100), 1000)
        == [token for key in (5, 6, 7) for token in run_tokens(Run(key, 512), 1000)][:1100]
    )
    assert len(render_text(make_runs(5, 700)).split()) == 700


def test_text_is_no_token_ids() -> None:
    assert render_tokens((Run(1, 2), Text("a")), 10) is None
    assert render_text((Text("a b"), Text("c"))) == "a bc"


def test_draws_depend_on_seed_and_stream_only() -> None:
    first = draw_uniform(1, 2, 5000)
    assert first.tolist() == draw_uniform(1, 2, 5000).tolist()
    assert first[:10].tolist() == draw_uniform(1, 2, 10).tolist()
    assert not set(first.tolist()) & set(draw_uniform(2, 2, 5000).tolist())
    assert not set(first.tolist()) & set(draw_uniform(1, 3, 5000).tolist())
    assert first.min() >= 0
    assert first.max() < 1
    # Mean and variance of the uniform distribution, four standard errors wide.
    assert abs(first.mean() - 0.5) < 4 * (1 / 12 / 5000) ** 0.5
    assert draw_exponential(1, 2, 20_000, 3.0) == pytest.approx(-3.0 * np.log1p(-draw_uniform(1, 2, 20_000)))
