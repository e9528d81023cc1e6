"""Mean KL divergence of the native engine's answers from float32, for every way to keep and multiply weights.

Two oracles, both the numpy reference in float32: on the weights that the engine was given (what arithmetic
and bf16 cost), and on those before they were quantised again (what the format costs). The model's own file
holds Q4_1 and Q8_0; other formats are made from it by ggml's rules. K types need inputs in multiples of 256:
ffn_down only. Beside a chat prompt there is a longer text (decision record 0001), for perplexity.

    python benchmarks/weight_accuracy.py [--model M] [--isa NAME]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import gguf
import numpy as np

from memserve import _native
from memserve.core.config import Activations
from memserve.engine.models.chat_template import ChatMessage
from memserve.engine.models.ggml_types import GGML_TYPES
from memserve.engine.models.loader import ModelSource, open_model
from memserve.engine.models.spec import (
    Float,
    LayerWeights,
    Matrix,
    ModelWeights,
    StoredLayer,
    StoredMatrix,
    StoredWeights,
)
from memserve.engine.runners.base import ForwardBatch, Runner
from memserve.engine.runners.native import NativeRunner
from memserve.engine.runners.reference import ReferenceRunner
from recording import describe_commit, describe_machine

RESULTS = Path(__file__).parent / "results" / "weight_accuracy.json"
PROMPT = (
    "Explain in a few sentences why the sky is blue, what Rayleigh scattering is, and how the colour of the "
    "sky changes at sunset. Then name the capital of France and the year in which the Eiffel Tower was built."
)
TEXT = Path(__file__).parent.parent / "docs" / "decisions" / "0001-shape-of-the-project.md"
TYPES = {kind.name: kind for kind in GGML_TYPES.values()}


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Means over rows of the prompt and of the text; ``same_choice``: rows whose most likely token agrees.

    ``perplexity_ratio``: the text's perplexity by that of float32.
    """

    weights: str
    activations: str
    bits_per_weight: float
    kl_to_own_weights: float
    kl_to_file: float
    same_choice_as_file: float
    text_kl_to_file: float
    text_same_choice_as_file: float
    perplexity_ratio: float


@dataclass(frozen=True, slots=True)
class Judged:
    """Tokens, and what float32 on the file's weights makes of them."""

    tokens: np.ndarray
    expected: np.ndarray

    def divergence(self, found: np.ndarray) -> float:
        return divergence(self.expected, found)

    def same_choice(self, found: np.ndarray) -> float:
        return float((self.expected.argmax(-1) == found.argmax(-1)).mean())

    def perplexity_ratio(self, found: np.ndarray) -> float:
        rows, following = np.arange(len(self.tokens) - 1), self.tokens[1:]
        return float(np.exp((self.expected[rows, following] - found[rows, following]).mean()))


def log_probabilities(runner: Runner, tokens: np.ndarray) -> np.ndarray:
    """float64[rows, vocabulary] of the whole prompt in one pass."""
    layout, rows = runner.layout, len(tokens)
    count = layout.blocks_for(rows)
    memory = np.zeros((count + 1) * layout.block_bytes, np.uint8)
    first = -(-memory.ctypes.data // 64) * 64
    blocks = np.uint64(first) + np.arange(count, dtype=np.uint64) * np.uint64(layout.block_bytes)
    each = np.arange(rows, dtype=np.int32)
    logits = runner.forward(ForwardBatch(tokens, each, np.array([0, rows], np.int32), blocks[None], each))
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    normal: np.ndarray = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return normal


def divergence(expected: np.ndarray, found: np.ndarray) -> float:
    """Mean over rows of KL(expected || found), in nats; both are log-probabilities."""
    return float((np.exp(expected) * (expected - found)).sum(-1).mean())


def requantise(weights: ModelWeights, kind: str, only: str | None) -> StoredWeights:
    """Every matrix (or the parts named ``only``) in blocks of ``kind``."""

    def stored(name: str, matrix: Float) -> Matrix:
        if matrix is None or matrix.ndim == 1 or (only is not None and name != only):
            return matrix
        return StoredMatrix(kind, QUANTISERS[kind](matrix), matrix.shape[1])

    layers = [
        StoredLayer(**{part.name: stored(part.name, getattr(layer, part.name)) for part in fields(layer)})
        for layer in weights.layers
    ]
    return StoredWeights(
        weights.spec, stored("embedding", weights.embedding), weights.output_norm, None, layers
    )


def by_package(kind: gguf.GGMLQuantizationType) -> Callable[[Float], np.ndarray]:
    return lambda matrix: gguf.quantize(matrix, kind)


def as_q4_k(matrix: Float) -> np.ndarray:
    """Smallest and largest value of every 32; 6-bit scales and minima relative to the largest of 256."""
    groups = matrix.reshape(-1, 8, 32)
    low = np.minimum(groups.min(-1), 0)
    scale, minimum = (groups.max(-1) - low) / 15, -low
    steps = [np.maximum(x.max(-1), 1e-12)[:, None] / 63 for x in (scale, minimum)]
    d, dmin = (step.astype(np.float16) for step in steps)
    s, m = np.rint(scale / steps[0]).astype(np.uint8), np.rint(minimum / steps[1]).astype(np.uint8)
    wide = np.maximum(d.astype(np.float32) * s, 1e-12)[..., None]
    q = np.rint((groups + (dmin.astype(np.float32) * m)[..., None]) / wide).clip(0, 15).astype(np.uint8)
    packed = [
        s[:, :4] | ((s[:, 4:] >> 4) << 6),
        m[:, :4] | ((m[:, 4:] >> 4) << 6),
        (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4),
    ]
    nibbles = (q[:, 0::2] | (q[:, 1::2] << 4)).reshape(len(q), 128)
    raw = np.concatenate([d.view(np.uint8), dmin.view(np.uint8), *packed, nibbles], axis=1)
    return raw.reshape(len(matrix), -1)


def as_q6_k(matrix: Float) -> np.ndarray:
    """The largest of every 16 is 31 steps; 8-bit scales relative to the largest of 256."""
    groups = matrix.reshape(-1, 16, 16)
    scale = np.abs(groups).max(-1) / 31
    step = np.maximum(scale.max(-1), 1e-12)[:, None] / 127
    d = step.astype(np.float16)
    s = np.rint(scale / step).astype(np.int8)
    wide = np.maximum(d.astype(np.float32) * s, 1e-12)[..., None]
    q = (np.rint(groups / wide).clip(-32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = (q[:, :, :2] & 15) | ((q[:, :, 2:] & 15) << 4)
    high = sum(((q[:, :, i] >> 4) << (2 * i) for i in range(4)), np.zeros_like(q[:, :, 0]))
    parts = [low.reshape(-1, 128), high.reshape(-1, 64), s.view(np.uint8), d.view(np.uint8)]
    return np.concatenate(parts, axis=1).reshape(len(matrix), -1)


QUANTISERS: dict[str, Callable[[Float], np.ndarray]] = {
    "Q4_0": by_package(gguf.GGMLQuantizationType.Q4_0),
    "Q4_1": by_package(gguf.GGMLQuantizationType.Q4_1),
    "Q8_0": by_package(gguf.GGMLQuantizationType.Q8_0),
    "Q4_K": as_q4_k,
    "Q6_K": as_q6_k,
}


def expand(weights: StoredWeights) -> ModelWeights:
    """The same numbers in float32."""

    def floats(matrix: Matrix) -> Float:
        if not isinstance(matrix, StoredMatrix):
            return matrix
        return TYPES[matrix.kind].dequantize(matrix.rows.reshape(-1)).reshape(-1, matrix.inputs)

    layers = [
        LayerWeights(**{part.name: floats(getattr(layer, part.name)) for part in fields(layer)})
        for layer in weights.layers
    ]
    embedding = floats(weights.embedding)
    return ModelWeights(weights.spec, embedding, weights.output_norm, embedding, layers)


def prompt_of(source: ModelSource) -> str:
    template = source.chat_template()
    return template.render([ChatMessage("user", PROMPT)], add_generation_prompt=True) if template else PROMPT


def measure(source: ModelSource, isa: str | None) -> list[Accuracy]:
    weights = source.weights()
    assert weights.head is weights.embedding, "this benchmark expects a tied embedding"
    tokenizer = source.tokenizer()
    parts = [getattr(layer, part.name) for layer in weights.layers for part in fields(layer)]
    parameters = weights.embedding.size + sum(part.size for part in parts if part is not None)

    def judged(text: str, special: bool) -> Judged:
        tokens = np.array(tokenizer.encode(text, special=special), np.int32)
        return Judged(tokens, log_probabilities(ReferenceRunner(weights), tokens))

    prompt, text = judged(prompt_of(source), True), judged(TEXT.read_text(), False)
    results = []

    def add(
        name: str,
        kept: ModelWeights | StoredWeights,
        keep: str,
        own: np.ndarray | None,
        activations: Activations = Activations.BF16,
    ) -> None:
        context = max(len(prompt.tokens), len(text.tokens))
        runner = NativeRunner(kept, threads=1, context=context, isa=isa, keep=keep, activations=activations)
        answer, reading = log_probabilities(runner, prompt.tokens), log_probabilities(runner, text.tokens)
        results.append(
            Accuracy(
                weights=name,
                activations=activations,
                bits_per_weight=8 * runner.weight_bytes / parameters,
                kl_to_own_weights=divergence(own, answer) if own is not None else float("nan"),
                kl_to_file=prompt.divergence(answer),
                same_choice_as_file=prompt.same_choice(answer),
                text_kl_to_file=text.divergence(reading),
                text_same_choice_as_file=text.same_choice(reading),
                perplexity_ratio=text.perplexity_ratio(reading),
            )
        )
        print(results[-1], flush=True)
        runner.close()

    def stored() -> StoredWeights:
        return replace(kept := source.stored_weights(), layers=list(kept.layers))

    add("bf16", weights, "bf16", prompt.expected)
    for activations in Activations:
        add("stored (Q4_1, Q8_0)", stored(), "stored", prompt.expected, activations)
        add("int8 from float32", weights, "int8", None, activations)
    for kind in QUANTISERS:
        only = "down" if kind.endswith("K") else None
        again = requantise(weights, kind, only)
        own = log_probabilities(ReferenceRunner(expand(again)), prompt.tokens)
        for activations in Activations:
            add(f"{kind}, ffn_down only" if only else f"{kind} throughout", again, "stored", own, activations)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--isa", choices=_native.supported_isas())
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    source = open_model(arguments.model)
    report = {
        "machine": describe_machine(),
        "commit": describe_commit(),
        "isa": arguments.isa or _native.isa(),
        "model": source.spec.identity,
        "accuracy": [asdict(row) for row in measure(source, arguments.isa)],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
