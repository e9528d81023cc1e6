"""What KV in int8 changes in a model's answers, beside KV in bf16 and beside what rounding alone changes.

Real texts are read once with each kind of KV by the same kernels; every position's distribution over the
next token is compared with that of bf16. ``rounding`` is the yardstick: bf16 on another instruction set,
which sums in another order. Rows of answers have the bits of rows of prompts, so this holds for both.

    python benchmarks/kv_accuracy.py --data FOLDER [--tokens N] [--model M] [--isa NAME]

FOLDER holds ``loogle/longdep_qa.jsonl`` (documents under ``input``) and ``sharegpt/conversations.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from memserve import _native
from memserve.engine.models.loader import ModelSource, open_model
from memserve.engine.runners.base import ForwardBatch
from memserve.engine.runners.native import NativeRunner
from recording import describe_commit, describe_machine

RESULTS = Path(__file__).parent / "results" / "kv_accuracy.json"
STEP = 256  # tokens per pass: bounds the memory of logits
YARDSTICK_TOKENS = 1024  # the other instruction set is slow
EDGES = (0, 512, 2048, 1 << 30)


@dataclass(frozen=True, slots=True)
class Rows:
    """Per position: KL(bf16 || other) in nats, whether the likeliest token agrees, -log p of the text's."""

    divergence: np.ndarray
    agrees: np.ndarray
    loss: np.ndarray
    loss_bf16: np.ndarray


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Over positions from ``begin`` to ``end`` of a text; perplexities of the text itself."""

    text: str
    other: str
    begin: int
    end: int
    mean_kl: float
    largest_kl: float
    same_choice: float
    perplexity_bf16: float
    perplexity: float


class Reader:
    """Reads one text pass by pass into blocks of its own."""

    def __init__(self, runner: NativeRunner, tokens: np.ndarray) -> None:
        self._runner, self._tokens = runner, tokens
        layout = runner.layout
        count = layout.blocks_for(len(tokens))
        self._memory = np.zeros(count * layout.block_bytes + 64, np.uint8)
        first = -(-self._memory.ctypes.data // 64) * 64
        self._blocks = np.uint64(first) + np.arange(count, dtype=np.uint64) * np.uint64(layout.block_bytes)

    def log_probabilities(self, begin: int, end: int) -> np.ndarray:
        """float32[end - begin, vocabulary]."""
        positions = np.arange(begin, end, dtype=np.int32)
        starts = np.array([0, len(positions)], np.int32)
        logits = self._runner.forward(
            ForwardBatch(self._tokens[begin:end], positions, starts, self._blocks[None], positions - begin)
        )
        normal = logits - logits.max(-1, keepdims=True)
        normal -= np.log(np.exp(normal).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
        return normal


def compare(bf16: NativeRunner, other: NativeRunner, tokens: np.ndarray) -> Rows:
    readers = [Reader(runner, tokens) for runner in (bf16, other)]
    parts = []
    for begin in range(0, len(tokens) - 1, STEP):
        end = min(begin + STEP, len(tokens) - 1)
        expected, found = (reader.log_probabilities(begin, end) for reader in readers)
        each, following = np.arange(end - begin), tokens[begin + 1 : end + 1]
        divergence = (np.exp(expected) * (expected - found)).sum(-1, dtype=np.float64)
        agrees = expected.argmax(-1) == found.argmax(-1)
        parts.append((divergence, agrees, -found[each, following], -expected[each, following]))
    return Rows(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def summarise(text: str, other: str, rows: Rows) -> Iterator[Accuracy]:
    """The whole, and apart by how much context a position has."""
    whole = len(rows.loss)
    ranges = [(0, whole), *((a, min(b, whole)) for a, b in pairwise(EDGES))]
    for begin, end in dict.fromkeys(ranges):
        if begin < end:
            part = slice(begin, end)
            yield Accuracy(
                text,
                other,
                begin,
                end,
                float(rows.divergence[part].mean()),
                float(rows.divergence[part].max()),
                float(rows.agrees[part].mean()),
                float(np.exp(rows.loss_bf16[part].mean(dtype=np.float64))),
                float(np.exp(rows.loss[part].mean(dtype=np.float64))),
            )


def join(rows: list[Rows]) -> Rows:
    return Rows(*(np.concatenate(column) for column in zip(*map(_columns, rows), strict=True)))


def _columns(rows: Rows) -> tuple[np.ndarray, ...]:
    return rows.divergence, rows.agrees, rows.loss, rows.loss_bf16


def read_texts(data: Path) -> dict[str, str]:
    """Three documents and a conversation."""
    texts = {}
    for line in (data / "loogle" / "longdep_qa.jsonl").read_text().splitlines()[:3]:
        document = json.loads(line)
        texts[f"loogle: {document['title']}"] = document["input"]
    conversations = json.loads((data / "sharegpt" / "conversations.json").read_text())
    longest = max(conversations, key=lambda each: sum(len(turn["value"]) for turn in each["conversations"]))
    turns = [f"{turn['from']}: {turn['value']}" for turn in longest["conversations"]]
    return texts | {f"sharegpt {longest['id']}": "\n".join(turns)}


def measure(source: ModelSource, texts: dict[str, str], limit: int, isa: str) -> list[Accuracy]:
    levels = _native.supported_isas()
    second = levels[levels.index(isa) + 1] if isa != levels[-1] else levels[0]
    stored, tokenizer = source.stored_weights(), source.tokenizer()
    layers = list(stored.layers)

    def runner(kv_dtype: str, level: str) -> NativeRunner:
        weights = replace(stored, layers=layers)
        return NativeRunner(weights, threads=1, context=limit, isa=level, kv_dtype=kv_dtype)

    bf16 = runner("bf16", isa)
    results: list[Accuracy] = []
    yardstick = (f"rounding ({second})", "bf16", second, min(limit, YARDSTICK_TOKENS))
    for name, kv_dtype, level, most in (("int8", "int8", isa, limit), yardstick):
        compared, all_rows = runner(kv_dtype, level), []
        for text, words in texts.items():
            tokens = np.array(tokenizer.encode(words, special=False)[:most], np.int32)
            all_rows.append(compare(bf16, compared, tokens))
            results += summarise(text, name, all_rows[-1])
            print(results[-1], flush=True)
        results.append(next(summarise("all", name, join(all_rows))))
        print(results[-1], flush=True)
        compared.close()
    bf16.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096, help="of each text")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--isa", choices=_native.supported_isas(), default=_native.isa())
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    source = open_model(arguments.model)
    accuracy = measure(source, read_texts(arguments.data), arguments.tokens, arguments.isa)
    report = {
        "machine": describe_machine(),
        "commit": describe_commit(),
        "isa": arguments.isa,
        "model": source.spec.identity,
        "accuracy": [asdict(row) for row in accuracy],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
