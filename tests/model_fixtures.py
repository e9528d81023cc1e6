"""Small random models of every family, and what transformers computes with them (tests/data/models).

A fixture is config.json as transformers writes it, and expected.npz: shapes of all tensors, a prompt, logits
of some of its rows, greedy tokens. Weights are drawn from the tensors' names, so they need not be stored.
``scripts/make_model_fixtures.py`` writes the fixtures.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FOLDER = Path(__file__).parent / "data" / "models"
Float = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Fixture:
    """``logits``: float32[rows, vocabulary], of the prompt's ``rows``; ``greedy`` continues the prompt."""

    name: str
    config: dict[str, object]
    tensors: dict[str, Float]
    prompt: NDArray[np.int32]
    rows: NDArray[np.int32]
    logits: Float
    greedy: NDArray[np.int32]

    def save(self) -> None:
        folder = FOLDER / self.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2, sort_keys=True) + "\n")
        shapes = json.dumps({name: list(values.shape) for name, values in sorted(self.tensors.items())})
        np.savez_compressed(
            folder / "expected.npz",
            shapes=np.array(shapes),
            prompt=self.prompt,
            rows=self.rows,
            logits=self.logits,
            greedy=self.greedy,
        )


def fixture_names() -> list[str]:
    return sorted(path.name for path in FOLDER.iterdir() if path.is_dir())


def load_fixture(name: str) -> Fixture:
    config = json.loads((FOLDER / name / "config.json").read_text())
    with np.load(FOLDER / name / "expected.npz") as stored:
        shapes: dict[str, list[int]] = json.loads(str(stored["shapes"]))
        tensors = {tensor: draw_tensor(tensor, tuple(shape)) for tensor, shape in shapes.items()}
        return Fixture(
            name, config, tensors, stored["prompt"], stored["rows"], stored["logits"], stored["greedy"]
        )


def draw_tensor(name: str, shape: tuple[int, ...]) -> Float:
    """A tensor of the size that trained models have, exact in bf16; equal for equal names and shapes.

    Made of raw bits, whose stream numpy guarantees, where it may change how it draws from a distribution.
    """
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    uniform = ((bits >> np.uint64(40)).astype(np.float64) / 2**24 - 0.5) * np.sqrt(12)
    values = (_centre(name) + _spread(name, shape) * uniform).astype(np.float32)
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).reshape(shape)


def _centre(name: str) -> float:
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return 1.5
    return 1.0 if name.endswith("norm.weight") else 0.0


def _spread(name: str, shape: tuple[int, ...]) -> float:
    if name.endswith("norm.weight"):
        return 0.2
    if name.endswith(".bias"):
        return 0.5
    # Larger q and k make attention choose instead of averaging over everything.
    return (2.0 if "q_proj" in name or "k_proj" in name else 1.0) / np.sqrt(shape[-1])
