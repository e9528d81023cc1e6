"""What is measured on which model, and how samples become figures: medians, spread, ratios. Pure."""

from __future__ import annotations

import fnmatch
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from memserve.engine.models.spec import ModelSpec
from peers.model_files import LLAMA_1B
from peers.protocol import Decode, Mixed, MixedTimed, Prefill, Timed

DEADLINE_SECONDS, SECONDS_PER_TOKEN = 60.0, 0.1
"""No engine that is any use takes longer than this for a measurement."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement; ``name`` is what ``--only`` matches."""

    name: str
    request: Prefill | Decode | Mixed


@dataclass(frozen=True, slots=True)
class Sample:
    """One number of one round."""

    engine: str
    round: int
    metric: str
    value: float


@dataclass(frozen=True, slots=True)
class Spread:
    """Of the rounds."""

    median: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True, slots=True)
class Row:
    """One metric: every engine's figures, and ours to each peer's and to the best peer's of each round.

    Ratios above 1 are in our favour, whether a metric is better high or low.
    """

    metric: str
    higher_is_better: bool
    figures: dict[str, Spread]
    ratios: dict[str, Spread]
    to_best: Spread | None


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine can do: bytes/s read, FLOP/s of bf16 dot products."""

    bandwidth: float
    peak: float


def prefill(tokens: int, repeats: int = 1) -> Figure:
    return Figure(f"prefill {tokens}", Prefill(tokens, repeats))


def decode(streams: int, context: int, steps: int) -> Figure:
    return Figure(f"decode b{streams} at {context}", Decode(streams, context, steps))


def figures_of(model: str, *, quick: bool = False) -> list[Figure]:
    """The figures of a model by name; ``quick``: few and small ones."""
    if quick:
        return [prefill(128, 2), prefill(512), decode(1, 512, 16), decode(8, 128, 16)]
    if model == LLAMA_1B:
        # A bigger model shows the same limits at smaller sizes; all else would take hours.
        return [prefill(128, 2), prefill(512), decode(1, 512, 16), decode(8, 128, 16), decode(16, 128, 8)]
    return [
        *(prefill(tokens, repeats) for tokens, repeats in ((128, 4), (512, 2), (2048, 1), (4096, 1))),
        decode(1, 512, 48),
        decode(1, 4096, 32),
        decode(8, 256, 32),
        decode(16, 256, 32),
        Figure("mixed", Mixed(streams=8, stream_prompt=256, prompts=4, prompt_tokens=1000, idle_tokens=40)),
    ]


def select(figures: Sequence[Figure], patterns: Sequence[str]) -> list[Figure]:
    """Those whose name matches a pattern (``prefill*``); all without patterns."""
    wanted = patterns or ["*"]
    return [each for each in figures if any(fnmatch.fnmatchcase(each.name, one) for one in wanted)]


def warm_up_of(figures: Sequence[Figure]) -> list[Prefill | Decode]:
    """Smaller runs of the same kinds, so that nothing is measured the first time it is done."""
    longest = max((f.request.tokens for f in figures if isinstance(f.request, Prefill)), default=0)
    batches = sorted({f.request.streams for f in figures if isinstance(f.request, Decode)})
    prompts = [Prefill(size) for size in (128, 512, 1024) if size <= longest]
    return [*prompts, *(Decode(streams, 64, 4) for streams in batches)]


def tokens_of(request: Prefill | Decode | Mixed) -> int:
    """Roughly how many tokens an engine works through."""
    match request:
        case Prefill(tokens, repeats):
            return tokens * repeats
        case Decode(streams, context, steps):
            return streams * (context + 8 * steps)
        case Mixed(streams, stream_prompt, prompts, prompt_tokens, idle_tokens):
            return streams * (stream_prompt + 8 * idle_tokens) + 3 * prompts * prompt_tokens


def deadline_of(request: Prefill | Decode | Mixed) -> float:
    """Seconds after which an engine counts as hung."""
    return DEADLINE_SECONDS + SECONDS_PER_TOKEN * tokens_of(request)


def samples_of(figure: Figure, answer: Timed | MixedTimed, engine: str, turn: int) -> list[Sample]:
    """The numbers in an answer. Repeats within a round count once, by their median."""
    if isinstance(answer, Timed):
        rate = answer.tokens / statistics.median(answer.seconds)
        return [Sample(engine, turn, f"{figure.name}: tokens/s", rate)]
    request = figure.request
    assert isinstance(request, Mixed), "only mixed load is timed like that"
    tokens = request.prompts * request.prompt_tokens
    values = {
        "p99 between tokens, ms": answer.mixed_p99 * 1e3,
        "p99 between tokens, of the idle median": answer.mixed_p99 / answer.idle_p50,
        "p99 between tokens, of the idle p99": answer.mixed_p99 / answer.idle_p99,
        "prefill tokens/s": tokens / answer.mixed_seconds,
        "prefill, of alone": answer.alone_seconds / answer.mixed_seconds,
    }
    return [Sample(engine, turn, f"{figure.name}: {name}", value) for name, value in values.items()]


def higher_is_better(metric: str) -> bool:
    return "between tokens" not in metric


def spread_of(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values), len(values))


def compare(samples: Iterable[Sample], ours: str) -> list[Row]:
    """A row per metric, in the order in which they were measured first. Ratios pair samples of one round."""
    metrics: dict[str, dict[str, dict[int, float]]] = {}
    for sample in samples:
        engines = metrics.setdefault(sample.metric, {})
        engines.setdefault(sample.engine, {})[sample.round] = sample.value
    return [_row(metric, engines, ours) for metric, engines in metrics.items()]


def _row(metric: str, engines: dict[str, dict[int, float]], ours: str) -> Row:
    high = higher_is_better(metric)
    own = engines.get(ours, {})
    # Other ways of running our own engine are no peers of it.
    peers = {name: rounds for name, rounds in engines.items() if _kind(name) != _kind(ours)}
    ratios: dict[str, Spread] = {}
    for name, rounds in engines.items():
        paired = [_advantage(own[turn], value, high) for turn, value in rounds.items() if turn in own]
        if paired and name != ours:
            ratios[name] = spread_of(paired)
    best = [
        min(_advantage(value, rounds[turn], high) for rounds in peers.values() if turn in rounds)
        for turn, value in own.items()
        if any(turn in rounds for rounds in peers.values())
    ]
    figures = {name: spread_of(list(rounds.values())) for name, rounds in engines.items()}
    return Row(metric, high, figures, ratios, spread_of(best) if best else None)


def _kind(label: str) -> str:
    """The engine's name without its options."""
    return label.partition(":")[0]


def _advantage(own: float, other: float, high: bool) -> float:
    return own / other if high else other / own


def floor_seconds(request: Prefill | Decode, spec: ModelSpec, weight_bytes: int, limits: Limits) -> float:
    """No engine is faster with KV in 16 bits: a pass reads weights and KV once, multiplies at peak.

    A decode is one pass of all streams; a prefill is one pass of all tokens.
    """
    kv = spec.kv_heads * spec.head_dim
    per_layer = spec.hidden * (2 * spec.heads * spec.head_dim + 2 * kv + 3 * spec.feed_forward)
    head = spec.vocabulary * spec.hidden
    if isinstance(request, Decode):
        rows = logits = request.streams
        seen = float(rows * request.context)
        read = seen
    else:
        rows, logits = request.tokens, 1
        seen, read = rows * rows / 2, float(rows)
    attention = 4 * seen * spec.heads * spec.head_dim * spec.layers
    flop = 2 * (per_layer * spec.layers * rows + head * logits) + attention
    return max((weight_bytes + 4 * kv * spec.layers * read) / limits.bandwidth, flop / limits.peak)


def limit_samples(
    figure: Figure, spec: ModelSpec, weight_bytes: int, limits: Sequence[Limits]
) -> list[float]:
    """Tokens/s that no engine can exceed, of each round; empty for mixed load."""
    request = figure.request
    if isinstance(request, Mixed):
        return []
    tokens = request.streams if isinstance(request, Decode) else request.tokens
    return [tokens / floor_seconds(request, spec, weight_bytes, each) for each in limits]


def rotated(names: Sequence[str], by: int) -> list[str]:
    """``names`` in another order for every ``by``, each name first in turn."""
    start = by % len(names)
    return [*names[start:], *names[:start]]


def another_round(done: int, most: int, spent: float, share: float) -> bool:
    """Whether one more round as long as the last ones fits into ``share`` seconds; one is always made."""
    return done == 0 or (done < most and spent * (done + 1) / done <= share)
