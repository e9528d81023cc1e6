"""Chooses tokens from logits. Pure: the random number is a function of the seed and the token's index.

The order is vLLM's: temperature, then top_k, then top_p. Log-probabilities are those of the model, before
any of that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memserve.core.errors import RequestFailed
from memserve.core.types import SamplingParams, TokenLogprob

Floats = NDArray[np.float32]
Ids = NDArray[np.intp]

_GREEDY_BELOW = 1e-5
"""Temperatures below this one are greedy, as in vLLM: dividing by them would overflow."""


_LEAST_SHARE = 1e-9
"""A top_p of 0 means the likeliest token, not none."""


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A chosen token; ``logprob`` is None unless the request asked for log-probabilities."""

    token: int
    logprob: TokenLogprob | None = None


def sample_row(logits: Floats, params: SamplingParams, index: int) -> SampledToken:
    """Choose a token from ``logits``: float32[vocabulary].

    ``index`` counts the request's sampled tokens from 0. Equal arguments give equal tokens in every
    process. Raises ``RequestFailed`` if the logits are not numbers.
    """
    if params.temperature < _GREEDY_BELOW:
        token = int(np.argmax(logits))
        _check_finite(float(logits[token]))
    else:
        token = _draw(logits, params, draw_uniform(params.seed, params.first_index + index))
    if params.logprobs is None:
        return SampledToken(token)
    return SampledToken(token, report_logprobs(logits, token, params.logprobs))


def draw_uniform(seed: int, index: int) -> float:
    """The random number in [0, 1) of one token: Philox keyed by ``seed``, its counter at ``index``."""
    philox = np.random.Philox(key=seed & (1 << 64) - 1, counter=index)
    return float(np.random.Generator(philox).random())


def report_logprobs(logits: Floats, token: int, alternatives: int) -> TokenLogprob:
    """Log-probabilities of ``token`` and of the likeliest tokens, best first, ties by id."""
    peak = float(logits.max())
    _check_finite(peak)
    normaliser = peak + float(np.log(np.exp(logits - np.float32(peak)).sum(dtype=np.float64)))
    top: tuple[tuple[int, float], ...] = ()
    if alternatives:
        best = _rank(logits, _top_ids(logits, alternatives))[:alternatives]
        top = tuple((int(other), float(logits[other]) - normaliser) for other in best)
    return TokenLogprob(token, float(logits[token]) - normaliser, top)


def _draw(logits: Floats, params: SamplingParams, uniform: float) -> int:
    peak = logits.max()
    _check_finite(float(peak))
    ids: Ids | None = None
    if 0 < params.top_k < len(logits):
        ids = _top_ids(logits, params.top_k)
    candidates = logits if ids is None else logits[ids]
    masses = np.exp((candidates - peak) / np.float32(params.temperature))
    if params.top_p < 1:
        kept = _nucleus(masses, max(params.top_p, _LEAST_SHARE))
        masses = masses[kept]
        ids = kept if ids is None else ids[kept]
    chosen = _invert(masses, uniform)
    return chosen if ids is None else int(ids[chosen])


def _invert(masses: Floats, uniform: float) -> int:
    """Index at which the running sum of ``masses`` passes ``uniform`` of the total."""
    running = np.cumsum(masses, dtype=np.float64)
    at = int(np.searchsorted(running, uniform * running[-1], side="right"))
    # Rounding may carry the target to the total itself: the last candidate with any mass is meant then.
    return at if at < len(running) else int(np.searchsorted(running, running[-1], side="left"))


def _top_ids(values: Floats, count: int) -> Ids:
    """Ascending indices of the ``count`` largest values and of all that equal the smallest of them.

    Decided by value, not by the order in which a partition leaves ties, which depends on the machine.
    """
    if count >= len(values):
        return np.arange(len(values))
    return np.flatnonzero(values >= np.partition(values, len(values) - count)[len(values) - count])


def _rank(values: Floats, ids: Ids) -> Ids:
    """``ids`` by falling value, ties by id."""
    return ids[np.argsort(-values[ids], kind="stable")]


def _nucleus(masses: Floats, share: float) -> Ids:
    """Ascending indices of the fewest largest ``masses`` that hold ``share`` of the total; of ties the first.

    Finds the bin of values in which the share is reached and sorts that bin only. The upper half of a
    positive float's bits, read as an integer, rises with its value: that is the bin.
    """
    total = float(masses.sum(dtype=np.float64))
    # All that lie below this mean together hold less than what may be dropped.
    ids = np.flatnonzero(masses >= (1 - share) * total / len(masses))
    values = masses[ids]
    bins = values.view(np.int32) >> 16
    held = np.bincount(bins, weights=values)[::-1]
    running = np.cumsum(held)
    at = min(int(np.searchsorted(running, share * total)), len(held) - 1)
    edge = len(held) - 1 - at
    inside = _rank(values, np.flatnonzero(bins == edge))
    before = running[at] - held[at]
    size = int(np.searchsorted(before + np.cumsum(values[inside], dtype=np.float64), share * total)) + 1
    kept = np.concatenate([np.flatnonzero(bins > edge), inside[:size]])
    kept.sort()
    chosen: Ids = ids[kept]
    return chosen


def _check_finite(peak: float) -> None:
    if not np.isfinite(peak):
        raise RequestFailed(
            f"the model's logits are not numbers (the largest is {peak}); nothing was sampled"
        )
