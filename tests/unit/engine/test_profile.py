"""Prices of steps that are measured at the start: the fit, the passes, and the file they are kept in."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import pytest

from memserve.core.clock import MonotonicClock
from memserve.core.types import InstanceId, StepPrices
from memserve.engine.models.tiny import tiny_weights
from memserve.engine.pace import StepTimes
from memserve.engine.profile import (
    ProfileStore,
    Trial,
    fit_prices,
    make_batch,
    measure_prices,
    profile_key,
    trials_within,
)
from memserve.engine.runners.reference import ReferenceRunner
from memserve.mempool import MemPool

TRUE = StepPrices(step=5e-3, row=4e-4, row_context=8e-7, proposed=1e-4, token=7e-4, token_context=4e-7)


def seconds_of(trial: Trial, prices: StepPrices = TRUE) -> float:
    times = StepTimes()
    times.assume(prices)
    return times.seconds_of(trial.work)


def test_prices_are_found_again() -> None:
    fitted = fit_prices([(trial, seconds_of(trial)) for trial in trials_within(8192, 512)])
    for found, true in zip(msgspec.structs.astuple(fitted), msgspec.structs.astuple(TRUE), strict=True):
        assert found == pytest.approx(true, rel=0.05)


def test_what_no_pass_tells_apart_keeps_its_usual_proportion() -> None:
    usual, decode = StepPrices(), Trial(1, 1, 64)
    fitted = fit_prices([(decode, 10 * seconds_of(decode, usual))])
    for found, true in zip(msgspec.structs.astuple(fitted), msgspec.structs.astuple(usual), strict=True):
        assert found == pytest.approx(10 * true, rel=0.01)


def test_prices_are_positive_whatever_was_measured() -> None:
    trials = list(trials_within(8192, 512))
    backwards = zip(trials, sorted((seconds_of(trial) for trial in trials), reverse=True), strict=True)
    assert min(msgspec.structs.astuple(fit_prices(list(backwards)))) > 0


@pytest.mark.parametrize(("context", "step_tokens"), [(64, 16), (256, 64), (8192, 512), (2, 1)])
def test_passes_fit_context_and_step(context: int, step_tokens: int) -> None:
    for trial in trials_within(context, step_tokens):
        assert trial.computed + trial.rows <= context
        assert trial.streams * trial.rows <= step_tokens


def test_measuring_gives_all_blocks_back() -> None:
    runner = ReferenceRunner(tiny_weights(3, context=256))
    pool = MemPool(runner.layout, 64, instance=InstanceId("one"), incarnation=1, clock=MonotonicClock())
    prices = measure_prices(runner, pool, context=256, step_tokens=64, seconds=60.0)
    assert prices is not None
    assert min(msgspec.structs.astuple(prices)) > 0
    assert pool.stats().free == 64
    taken = pool.alloc_mem(60)
    assert measure_prices(runner, pool, context=256, step_tokens=64) is None
    pool.free_mem(taken)
    pool.check(())
    pool.close()


def test_streams_share_what_is_behind_them_and_write_apart() -> None:
    runner = ReferenceRunner(tiny_weights(3, context=256))
    pool = MemPool(runner.layout, 16, instance=InstanceId("one"), incarnation=1, clock=MonotonicClock())
    addrs = pool.alloc_mem(13)
    batch = make_batch(Trial(8, 1, 64), pool.pointers(addrs), 16)
    assert batch.blocks.shape == (8, 5)
    assert (batch.blocks[:, :4] == batch.blocks[0, :4]).all()
    assert len(set(batch.blocks[:, 4].tolist())) == 8
    pool.free_mem(addrs)
    pool.close()


def test_what_was_kept_is_found(tmp_path: Path) -> None:
    store = ProfileStore(tmp_path / "new", "key")
    assert store.find() is None
    store.keep(TRUE)
    assert store.find() == TRUE
    assert ProfileStore(tmp_path / "new", "other key").find() is None
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".prices"]


@pytest.mark.parametrize("found", [b"", b"[1, 2", b'["a", 1, 1, 1, 1, 1]', b"[1, 1, -1, 1, 1, 1]"])
def test_a_file_that_makes_no_sense_is_not_used(tmp_path: Path, found: bytes) -> None:
    store = ProfileStore(tmp_path, "key")
    store.keep(TRUE)
    [path] = tmp_path.iterdir()
    path.write_bytes(found)
    assert store.find() is None


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with caplog.at_level(logging.WARNING):
        ProfileStore(in_the_way / "folder", "key").keep(TRUE)
    assert "not kept" in caplog.text


def test_prices_depend_on_threads_layout_and_how_weights_are_kept() -> None:
    one, other = (ReferenceRunner(tiny_weights(3, context=64)) for _ in range(2))
    assert profile_key(one, "stored", 1) == profile_key(other, "stored", 1)
    unlike = ReferenceRunner(tiny_weights(4, context=64))
    keys = [
        profile_key(one, "stored", 1),
        profile_key(one, "stored", 2),
        profile_key(one, "bf16", 1),
        profile_key(unlike, "stored", 1),
    ]
    assert len(set(keys)) == len(keys)
