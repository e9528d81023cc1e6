"""Checks the kernels for 64-bit ARM on any machine: cross-compiled, run in an emulator, compared with numpy.

Needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user); where one is
missing it says so and exits with code 77, which test drivers take for "skipped". On an ARM machine it uses
the machine itself.

For each level (neon-bf16, neon, portable), each way to hold weights and to multiply: logits against the
float32 reference runner; the same bits whatever the chunks and the number of threads. And each level must be
found, and only where the processor has its instructions.

    python scripts/check_neon.py [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import itertools
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memserve.engine.models.ggml_types import GGML_TYPES
from memserve.engine.models.spec import LayerWeights, Matrix, ModelWeights, StoredMatrix
from memserve.engine.models.tiny import tiny_weights
from memserve.engine.runners.base import ForwardBatch
from memserve.engine.runners.native import rope_tables
from memserve.engine.runners.reference import ReferenceRunner

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = 77
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
LEVELS = {
    "portable": [],
    "amx_emulated": [],
    "neon": [],
    "neon_bf16": ["-march=armv8.2-a+dotprod+bf16"],
}
SOURCES = ["model.cpp", "model_copy.cpp", "pack.cpp", "threads.cpp", "isa.cpp"]
OPTIONS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wno-psabi"]
OPTIONS += ["-Wno-unused-function", "-Wno-ignored-attributes", "-Wno-maybe-uninitialized"]
KINDS = {"F32": 0.0, "Q4_0": 2e-2, "Q4_1": 1e-2, "Q8_0": 1e-3, "Q4_K": 2e-4, "Q6_K": 3e-5}
"""GGML types, and how large the f16 numbers of a block are for weights of about 1/16."""
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
TOKENS = 300
"""Two segments of attention."""
CHUNKS = (1, 16, 230, 3, 17, 20, 1, 1, 1)
TOLERANCES = {"bf16": 0.03, "int8": 0.06}
"""Root of the mean square of the difference over the spread of logits, by what inputs are multiplied in."""

Float = NDArray[np.float32]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--keep", type=Path, help="where to leave program and files")
    options = parser.parse_args()
    native = platform.machine() in ("aarch64", "arm64")
    compiler = shutil.which("g++" if native else COMPILER)
    emulator = [] if native else [shutil.which(EMULATOR)]
    if compiler is None or None in emulator:
        print(f"skipped: this needs {COMPILER} and {EMULATOR} (g++-aarch64-linux-gnu and qemu-user)")
        return SKIPPED
    with tempfile.TemporaryDirectory(prefix="memserve-neon-") as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(exist_ok=True)
        program = build(compiler, folder)
        run = [*[word for word in emulator if word], *([] if native else ["-cpu", "max"]), str(program)]
        found = levels_of(run)
        print("levels:", ", ".join(found), flush=True)
        broken = [] if native else list(check_detection(run))
        for kind in KINDS:
            broken += check_kind(kind, run, found, folder)
    print("\n".join(broken) if broken else "all equal to the reference")
    return 1 if broken else 0


def build(compiler: str, folder: Path) -> Path:
    """Compile the levels with their own options and link the test program."""
    objects = []
    jobs = [(ROOT / "native" / f"level_{level}.cpp", options) for level, options in LEVELS.items()]
    jobs += [(ROOT / "native" / source, []) for source in SOURCES]
    jobs.append((ROOT / "tests" / "native" / "run_model.cpp", []))
    for source, options in jobs:
        objects.append(str(folder / f"{source.stem}.o"))
        subprocess.run([compiler, *OPTIONS, *options, "-c", str(source), "-o", objects[-1]], check=True)
    program = folder / "run_model"
    subprocess.run([compiler, *objects, "-static", "-pthread", "-o", str(program)], check=True)
    return program


def levels_of(run: Sequence[str]) -> list[str]:
    return subprocess.run([*run, "levels"], check=True, capture_output=True, text=True).stdout.split()


def check_detection(run: Sequence[str]) -> Iterator[str]:
    """A processor of 2012 has no bf16 instructions, the emulator's best has them."""
    old = [*run[:2], "cortex-a57", *run[3:]]
    for command, expected in ((run, ["neon-bf16", "neon", "portable"]), (old, ["neon", "portable"])):
        if (found := levels_of(command)) != expected:
            yield f"levels of {command[2]}: {found}, expected {expected}"


def check_kind(kind: str, run: Sequence[str], levels: Sequence[str], folder: Path) -> list[str]:
    """One model with weights of one type on all levels."""
    weights, stored = make_model(kind)
    tokens = np.random.default_rng(5).integers(0, weights.spec.vocabulary, TOKENS, np.int32)
    model = folder / f"model-{kind}"
    model.write_bytes(b"".join(encode_model(weights, stored, tokens)))
    expected = reference_logits(weights, tokens)
    broken = []
    for level, activations in itertools.product(levels, TOLERANCES):
        arguments = (run, model, level, activations, weights.spec.vocabulary)
        whole, chunked = run_model(*arguments, 1, []), run_model(*arguments, 2, CHUNKS)
        error = float(np.sqrt(((whole - expected) ** 2).mean()) / expected.std())
        same = np.array_equal(whole, chunked)
        name = f"{kind:5} {activations} {level:10}"
        verdict = "equal" if same else "DIFFER"
        print(f"{name} rms error {error:.4f}, chunks and threads {verdict}", flush=True)
        if not error < TOLERANCES[activations]:
            broken.append(f"{name}: rms error {error:.4f}, at most {TOLERANCES[activations]}")
        if not same:
            broken.append(f"{name}: other bits in chunks and with two threads")
    return broken


def run_model(
    run: Sequence[str],
    model: Path,
    level: str,
    activations: str,
    vocabulary: int,
    threads: int,
    chunks: Sequence[int],
) -> Float:
    output = model.with_suffix(".logits")
    command = [*run, str(model), level, activations, str(threads), str(output), *map(str, chunks)]
    subprocess.run(command, check=True, timeout=600)
    return np.fromfile(output, np.float32).reshape(-1, vocabulary)


def make_model(kind: str) -> tuple[ModelWeights, dict[int, StoredMatrix]]:
    """Random weights in float32, and the blocks they were expanded from, by the id of the matrix."""
    rng = np.random.default_rng(3)
    shape = {"layers": 1, "hidden": 256, "heads": 4, "kv_heads": 1, "head_dim": 64, "feed_forward": 256}
    weights = tiny_weights(3, vocabulary=80, tied=False, **shape)  # type: ignore[arg-type]
    blocks: dict[int, StoredMatrix] = {}

    def stored(values: Float) -> Float:
        if kind == "F32":
            return values
        blocks_of = random_blocks(rng, kind, *values.shape)
        expanded = expand(blocks_of)
        blocks[id(expanded)] = blocks_of
        return expanded

    for layer in weights.layers:
        for part in MATRICES:
            setattr(layer, part, stored(getattr(layer, part)))
    weights.embedding, weights.head = stored(weights.embedding), stored(weights.head)
    return weights, blocks


def random_blocks(rng: np.random.Generator, kind: str, outputs: int, inputs: int) -> StoredMatrix:
    stored = next(one for one in GGML_TYPES.values() if one.name == kind)
    raw = rng.integers(0, 256, (outputs * inputs // stored.values, stored.size), dtype=np.uint8)
    for at in (208,) if kind == "Q6_K" else (0, 2) if kind in ("Q4_1", "Q4_K") else (0,):
        sizes = (rng.uniform(0.5, 1, len(raw)) * KINDS[kind]).astype("<f2")
        if at == 2 and kind == "Q4_1":
            sizes = -8 * sizes
        raw[:, at : at + 2] = sizes.view(np.uint8).reshape(-1, 2)
    return StoredMatrix(kind, raw.reshape(outputs, -1), inputs)


def expand(matrix: StoredMatrix) -> Float:
    stored = next(one for one in GGML_TYPES.values() if one.name == matrix.kind)
    return stored.dequantize(matrix.rows.reshape(-1)).reshape(len(matrix.rows), matrix.inputs)


def reference_logits(weights: ModelWeights, tokens: NDArray[np.int32]) -> Float:
    runner = ReferenceRunner(weights)
    size, count = runner.layout.block_bytes, runner.layout.blocks_for(len(tokens))
    memory = np.zeros(count * size, np.uint8)
    blocks = np.uint64(memory.ctypes.data) + np.arange(count, dtype=np.uint64)[None] * np.uint64(size)
    rows = np.arange(len(tokens), dtype=np.int32)
    return runner.forward(ForwardBatch(tokens, rows, np.array([0, len(rows)], np.int32), blocks, rows))


def encode_model(
    weights: ModelWeights, stored: dict[int, StoredMatrix], tokens: NDArray[np.int32]
) -> Iterator[bytes]:
    """What tests/native/run_model.cpp reads."""
    spec = weights.spec
    heads = (spec.heads, spec.kv_heads, spec.head_dim)
    shape = (spec.layers, spec.hidden, *heads, spec.feed_forward, spec.vocabulary)
    yield struct.pack("<7if", *shape, spec.rms_epsilon)
    yield struct.pack("<i", len(tokens)) + tokens.tobytes()
    for table in rope_tables(spec, len(tokens)):
        yield table.tobytes()
    for layer in weights.layers:
        yield from encode_layer(layer, stored)
    for matrix in (weights.embedding, weights.head):
        yield encode_matrix(stored.get(id(matrix), matrix))
    yield weights.output_norm.tobytes()


def encode_layer(layer: LayerWeights, stored: dict[int, StoredMatrix]) -> Iterator[bytes]:
    yield layer.attention_norm.tobytes() + layer.ffn_norm.tobytes()
    for part in MATRICES:
        matrix = getattr(layer, part)
        yield encode_matrix(stored.get(id(matrix), matrix))


def encode_matrix(matrix: Matrix) -> bytes:
    if isinstance(matrix, StoredMatrix):
        kind, outputs, inputs, raw = matrix.kind, len(matrix.rows), matrix.inputs, matrix.rows.tobytes()
    else:
        (outputs, inputs), kind, raw = matrix.shape, "F32", matrix.astype(np.float32).tobytes()
    return struct.pack("<8siiq", kind.encode(), outputs, inputs, len(raw)) + raw


if __name__ == "__main__":
    sys.exit(main())
