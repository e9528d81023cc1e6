"""Speed of the native CPU engine on SmolLM2-135M's shape, beside what the machine can do at most.

Every round measures the limits (read bandwidth, register-fed dot products of bf16 and of integers) and then
each workload once, so that a busy neighbour slows both. Engines: ``bf16`` weights; ``stored``: 4 and 8 bits
as SmolLM2's GGUF file has them (Q4_1, embedding Q8_0); ``integers``: those times int8 activations. Weights
are random unless --model is given: values do not change speed.

    python benchmarks/native_speed.py [--rounds N] [--threads 1,2] [--isa NAME] [--model M] [--prototype DIR]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from memserve import _native
from memserve.core.config import Activations
from memserve.engine.models.loader import open_model
from memserve.engine.models.spec import (
    LayerWeights,
    ModelSpec,
    ModelWeights,
    StoredLayer,
    StoredMatrix,
    StoredWeights,
)
from memserve.engine.runners.base import ForwardBatch
from memserve.engine.runners.native import NativeRunner
from native_prototype import Prototype, why_not_here
from recording import describe_commit, describe_machine

RESULTS = Path(__file__).parent / "results" / "native_speed.json"
DECODE_CONTEXT = 128  # tokens that each decoding conversation has behind it
BLOCK = 16
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")

SMOLLM2 = ModelSpec(
    identity="random-smollm2-135m",
    architecture="llama",
    layers=30,
    hidden=576,
    heads=9,
    kv_heads=3,
    head_dim=64,
    feed_forward=1536,
    vocabulary=49152,
    context=8192,
    rms_epsilon=1e-5,
    rope_theta=1e5,
    eos_tokens=(2,),
)


@dataclass(frozen=True, slots=True)
class Workload:
    """``prefill``: one prompt of ``size`` tokens; ``decode``: a token for each of ``size`` conversations."""

    kind: str
    size: int

    @property
    def name(self) -> str:
        return f"{self.kind} {self.size}"


WORKLOADS = [
    *(Workload("prefill", n) for n in (128, 512, 2048)),
    *(Workload("decode", n) for n in (1, 4, 8, 16)),
]


@dataclass(frozen=True, slots=True)
class Limits:
    """bytes/s, and operations/s of bf16 and of 8-bit dot products."""

    bandwidth: float
    peak: float
    int8_peak: float


@dataclass(frozen=True, slots=True)
class Figure:
    """One workload at one number of threads.

    ``of_floor`` pairs times with limits of the same round, ``to_bf16`` with the bf16 engine's time: above 1
    is faster. ``weight_bytes`` are read once per pass.
    """

    engine: str
    threads: int
    workload: str
    tokens_per_second: float
    tokens_per_second_quartiles: tuple[float, float]
    best_tokens_per_second: float
    of_floor: float
    of_floor_quartiles: tuple[float, float]
    best_of_best_floor: float
    to_bf16: float
    to_bf16_quartiles: tuple[float, float]
    weight_bytes: int


def random_weights(spec: ModelSpec) -> ModelWeights:
    rng = np.random.default_rng(0)

    def matrix(outputs: int, inputs: int) -> np.ndarray:
        return rng.standard_normal((outputs, inputs), dtype=np.float32) / np.float32(np.sqrt(inputs))

    def layer() -> LayerWeights:
        hidden, kv, wide = spec.hidden, spec.kv_heads * spec.head_dim, spec.feed_forward
        return LayerWeights(
            attention_norm=np.ones(hidden, np.float32),
            q=matrix(hidden, hidden),
            k=matrix(kv, hidden),
            v=matrix(kv, hidden),
            o=matrix(hidden, hidden),
            ffn_norm=np.ones(hidden, np.float32),
            gate=matrix(wide, hidden),
            up=matrix(wide, hidden),
            down=matrix(hidden, wide),
        )

    embedding = matrix(spec.vocabulary, spec.hidden)
    layers = [layer() for _ in range(spec.layers)]
    return ModelWeights(spec, embedding, np.ones(spec.hidden, np.float32), embedding, layers)


def random_stored(weights: ModelWeights) -> StoredWeights:
    """Blocks as in SmolLM2's GGUF file, of the shapes of ``weights``."""
    rng = np.random.default_rng(0)

    def blocks(kind: str, size: int, like: np.ndarray) -> StoredMatrix:
        outputs, inputs = like.shape
        raw = rng.integers(0, 256, (outputs, inputs // 32, size), dtype=np.uint8)
        raw[..., :2] = np.full(1, 1e-3, np.float16).view(np.uint8)
        if kind == "Q4_1":
            raw[..., 2:4] = np.full(1, -8e-3, np.float16).view(np.uint8)
        return StoredMatrix(kind, raw.reshape(outputs, -1), inputs)

    layers = [
        StoredLayer(
            attention_norm=layer.attention_norm,
            ffn_norm=layer.ffn_norm,
            **{part: blocks("Q4_1", 20, getattr(layer, part)) for part in MATRICES},
        )
        for layer in weights.layers
    ]
    return StoredWeights(
        weights.spec, blocks("Q8_0", 34, weights.embedding), weights.output_norm, None, layers
    )


def load_weights(model: str | None) -> tuple[ModelWeights, StoredWeights]:
    """In float32 for bf16, and as stored."""
    if model is None:
        weights = random_weights(SMOLLM2)
        return weights, random_stored(weights)
    source = open_model(model)
    stored = source.stored_weights()
    return source.weights(), replace(stored, layers=list(stored.layers))


def blocks_of(workload: Workload) -> int:
    per_conversation = -(-(DECODE_CONTEXT + 1) // BLOCK)
    return workload.size * per_conversation if workload.kind == "decode" else -(-workload.size // BLOCK)


def make_batch(workload: Workload, blocks: np.ndarray, vocabulary: int) -> ForwardBatch:
    """``blocks``: uint64[at least blocks_of(workload)]."""
    rows = workload.size
    tokens = np.random.default_rng(1).integers(0, vocabulary, rows).astype(np.int32)
    used = blocks[: blocks_of(workload)].copy()
    if workload.kind == "prefill":
        ends = np.array([0, rows], np.int32)
        return ForwardBatch(
            tokens, np.arange(rows, dtype=np.int32), ends, used[None], np.array([rows - 1], np.int32)
        )
    positions = np.full(rows, DECODE_CONTEXT, np.int32)
    each = np.arange(rows, dtype=np.int32)
    return ForwardBatch(tokens, positions, np.arange(rows + 1, dtype=np.int32), used.reshape(rows, -1), each)


def floor_seconds(
    workload: Workload, spec: ModelSpec, weight_bytes: int, limits: Limits, activations: Activations
) -> float:
    """No pass is faster: all weights (and a decode's KV) are read once, every multiply-add runs at peak.

    Attention is bf16 in any engine. What integers need beside them, a few float operations per group of 32,
    is not in the floor.
    """
    kv = spec.kv_heads * spec.head_dim
    per_layer = spec.hidden * (2 * spec.hidden + 2 * kv + 3 * spec.feed_forward)
    head = spec.vocabulary * spec.hidden
    rows, logits = workload.size, workload.size if workload.kind == "decode" else 1
    seen = rows * DECODE_CONTEXT if workload.kind == "decode" else rows * rows / 2
    attention = 4 * seen * spec.heads * spec.head_dim * spec.layers
    products = 2 * (per_layer * spec.layers * rows + head * logits)
    peak = limits.int8_peak if activations is Activations.INT8 else limits.peak
    kv_bytes = 4 * kv * spec.layers * (seen if workload.kind == "decode" else rows)
    read = weight_bytes + kv_bytes
    return max(read / limits.bandwidth, products / peak + attention / limits.peak)


def seconds_of(engine: NativeRunner | Prototype, batch: ForwardBatch) -> float:
    start = time.perf_counter()
    engine.forward(batch)
    return time.perf_counter() - start


def quartiles(values: list[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds of each round of a workload, and of the bf16 engine in the same rounds."""

    engine: str
    threads: int
    workload: Workload
    weight_bytes: int
    activations: Activations
    times: list[float]
    bf16_times: list[float]


def figure_of(measured: Measured, spec: ModelSpec, limits: list[Limits]) -> Figure:
    workload, times, size = measured.workload, measured.times, measured.weight_bytes
    rates = [workload.size / t for t in times]

    def floor(limit: Limits) -> float:
        return floor_seconds(workload, spec, size, limit, measured.activations)

    fractions = [floor(limit) / t for limit, t in zip(limits, times, strict=True)]
    ratios = [bf16 / t for bf16, t in zip(measured.bf16_times, times, strict=True)]
    best = Limits(
        max(limit.bandwidth for limit in limits),
        max(limit.peak for limit in limits),
        max(limit.int8_peak for limit in limits),
    )
    return Figure(
        engine=measured.engine,
        threads=measured.threads,
        workload=workload.name,
        tokens_per_second=statistics.median(rates),
        tokens_per_second_quartiles=quartiles(rates),
        best_tokens_per_second=max(rates),
        of_floor=statistics.median(fractions),
        of_floor_quartiles=quartiles(fractions),
        best_of_best_floor=floor(best) / min(times),
        to_bf16=statistics.median(ratios),
        to_bf16_quartiles=quartiles(ratios),
        weight_bytes=size,
    )


def build_runners(
    weights: tuple[ModelWeights, StoredWeights], threads: int, isa: str | None
) -> dict[str, NativeRunner]:
    floats, stored = weights

    def build(kept: ModelWeights | StoredWeights, keep: str, activations: Activations) -> NativeRunner:
        return NativeRunner(kept, threads=threads, context=4096, isa=isa, keep=keep, activations=activations)

    return {
        "bf16": build(floats, "bf16", Activations.BF16),
        "stored": build(stored, "stored", Activations.BF16),
        "integers": build(stored, "stored", Activations.INT8),
    }


def measure_limits(threads: int, isa: str | None) -> Limits:
    peaks = [_native.dot_peak(threads, isa=isa, activations=kind) for kind in ("bf16", "int8")]
    return Limits(_native.read_bandwidth(threads, isa=isa), *peaks)


def measure(
    weights: tuple[ModelWeights, StoredWeights],
    threads: int,
    isa: str | None,
    rounds: int,
    prototype: Path | None,
) -> tuple[list[Limits], list[Figure]]:
    floats, _ = weights
    runners = build_runners(weights, threads, isa)
    engines: dict[str, NativeRunner | Prototype] = dict(runners)
    if prototype is not None:
        engines["prototype"] = Prototype(floats, prototype, threads)
    layout = runners["bf16"].layout
    count = max(blocks_of(w) for w in WORKLOADS)
    memory = np.zeros(count * layout.block_bytes + 64, np.uint8)
    first = np.uint64(-(-memory.ctypes.data // 64) * 64)
    blocks = first + np.arange(count, dtype=np.uint64) * np.uint64(layout.block_bytes)
    batches = {w: make_batch(w, blocks, floats.spec.vocabulary) for w in WORKLOADS}
    limits: list[Limits] = []
    times: dict[tuple[str, Workload], list[float]] = {(e, w): [] for w in WORKLOADS for e in engines}
    for engine in engines.values():
        for batch in batches.values():
            engine.forward(batch)
    for _ in range(rounds):
        limits.append(measure_limits(threads, isa))
        for (name, workload), taken in times.items():
            taken.append(seconds_of(engines[name], batches[workload]))
    activations = {name: Activations.INT8 if name == "integers" else Activations.BF16 for name in engines}
    sizes = {name: runners.get(name, runners["bf16"]).weight_bytes for name in engines}
    for runner in runners.values():
        runner.close()
    measured = [
        Measured(name, threads, workload, sizes[name], activations[name], taken, times["bf16", workload])
        for (name, workload), taken in times.items()
    ]
    return limits, [figure_of(each, floats.spec, limits) for each in measured]


def show(limits: list[Limits], figures: list[Figure]) -> None:
    bandwidth = statistics.median(limit.bandwidth for limit in limits) / 1e9
    peak = statistics.median(limit.peak for limit in limits) / 1e9
    int8_peak = statistics.median(limit.int8_peak for limit in limits) / 1e9
    print(
        f"\n{figures[0].threads} threads: reads {bandwidth:.1f} GB/s, dot products of bf16 {peak:.0f}, "
        f"of int8 {int8_peak:.0f} G operations/s (medians)"
    )
    print(
        f"{'engine':<10} {'workload':<13} {'tokens/s':>9} {'quartiles':>17} {'best':>7} {'of floor':>9}  best"
        "  to bf16"
    )
    for f in figures:
        low, high = f.tokens_per_second_quartiles
        print(
            f"{f.engine:<10} {f.workload:<13} {f.tokens_per_second:9.1f} {low:8.1f}-{high:<8.1f} "
            f"{f.best_tokens_per_second:7.0f} {f.of_floor:9.2f} {f.best_of_best_floor:5.2f} {f.to_bf16:8.2f}"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", default="1,2", help="thread counts, separated by commas")
    parser.add_argument("--isa", choices=_native.supported_isas())
    parser.add_argument("--model", help="as for `memserve serve`; default: random weights")
    parser.add_argument(
        "--prototype", type=Path, help="folder with native.cpp, run in the same rounds (needs AMX)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    reason = why_not_here() if arguments.prototype else None
    if reason:
        print(f"the prototype cannot run here: {reason}")
    weights = load_weights(arguments.model)
    report: dict[str, object] = {
        "machine": describe_machine(),
        "commit": describe_commit(),
        "isa": arguments.isa or _native.isa(),
        "model": weights[0].spec.identity,
        "rounds": arguments.rounds,
        "prototype": reason or (str(arguments.prototype.name) if arguments.prototype else "not asked for"),
    }
    limits_of: dict[str, list[dict[str, float]]] = {}
    all_figures: list[dict[str, object]] = []
    for threads in map(int, arguments.threads.split(",")):
        prototype = None if reason else arguments.prototype
        limits, figures = measure(weights, threads, arguments.isa, arguments.rounds, prototype)
        show(limits, figures)
        limits_of[str(threads)] = [asdict(limit) for limit in limits]
        all_figures += [asdict(figure) for figure in figures]
    report |= {"limits": limits_of, "figures": all_figures}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
