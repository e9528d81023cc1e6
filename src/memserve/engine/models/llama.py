"""The Llama family: which tensors a model has, their shapes, and what a plausible spec looks like.

Knows nothing about files; containers hand over shapes and float32 arrays by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

from memserve.core.errors import ModelError
from memserve.engine.models.spec import (
    Float,
    LayerWeights,
    Matrix,
    ModelSpec,
    ModelWeights,
    StoredLayer,
    StoredWeights,
)

Shape = tuple[int, ...]
Progress = Callable[[float], None]


class TensorSource(Protocol):
    """Named tensors, however they are stored."""

    @property
    def path(self) -> Path: ...

    def shape(self, name: str) -> Shape | None:
        """Row-major shape, or None when there is no such tensor."""
        ...

    def read(self, name: str) -> Float:
        """The tensor as a fresh float32 array."""
        ...

    def read_stored(self, name: str) -> Matrix:
        """A matrix in its own blocks where it has any, else as a fresh float32 array."""
        ...


@dataclass(frozen=True, slots=True)
class TensorNames:
    """How a container spells the tensors. ``layer`` holds ``{}`` for the index; ``parts`` follow it."""

    embedding: str
    output_norm: str
    head: str
    layer: str
    parts: LayerNames

    def in_layer(self, index: int, part: str) -> str:
        return self.layer.format(index) + str(getattr(self.parts, part))


@dataclass(frozen=True, slots=True)
class LayerNames:
    """One name per field of :class:`LayerWeights`."""

    attention_norm: str
    q: str
    k: str
    v: str
    o: str
    ffn_norm: str
    gate: str
    up: str
    down: str


_PARTS = tuple(part.name for part in fields(LayerNames))


def layer_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Shape of each field of :class:`LayerWeights`, [outputs, inputs]."""
    hidden, wide, narrow = spec.hidden, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    return {
        "attention_norm": (hidden,),
        "q": (wide, hidden),
        "k": (narrow, hidden),
        "v": (narrow, hidden),
        "o": (hidden, wide),
        "ffn_norm": (hidden,),
        "gate": (spec.feed_forward, hidden),
        "up": (spec.feed_forward, hidden),
        "down": (hidden, spec.feed_forward),
    }


def check_spec(spec: ModelSpec, path: Path) -> ModelSpec:
    """Return ``spec`` if its numbers fit together, else raise ``ModelError`` naming one that does not."""
    positive = ("layers", "hidden", "heads", "kv_heads", "head_dim", "feed_forward", "vocabulary", "context")
    for name in positive:
        value = getattr(spec, name)
        if not 1 <= value < 1 << 31:
            raise ModelError(f"{path}: {name} is {value}; expected a positive number")
    if spec.heads % spec.kv_heads:
        raise ModelError(f"{path}: {spec.heads} heads cannot share {spec.kv_heads} kv heads evenly")
    if spec.head_dim % 2:
        raise ModelError(f"{path}: head_dim is {spec.head_dim}; rotary embeddings need an even number")
    if not 0 <= spec.rms_epsilon < 1:
        raise ModelError(f"{path}: rms epsilon is {spec.rms_epsilon}; expected a number from 0 to 1")
    if not 1 < spec.rope_theta < float("inf"):
        raise ModelError(f"{path}: rope theta is {spec.rope_theta}; expected a number above 1")
    for token in spec.eos_tokens:
        if not 0 <= token < spec.vocabulary:
            raise ModelError(f"{path}: eos token {token} is outside the vocabulary of {spec.vocabulary}")
    return spec


def check_tensors(
    spec: ModelSpec,
    source: TensorSource,
    names: TensorNames,
    present: Iterable[str],
    ignored: Iterable[str] = (),
) -> None:
    """Check that exactly the expected tensors are there, in the expected shapes.

    A tensor that nobody would read means a model that would be computed wrongly, so it is an error too.
    """
    expected = set(ignored)
    for name, shape in _expected_shapes(spec, source, names):
        _check_shape(source, name, shape)
        expected.add(name)
    unread = sorted(set(present) - expected)
    if unread:
        raise ModelError(
            f"{source.path}: tensor {unread[0]} does not belong to a {spec.architecture} model as MemServe "
            f"knows it ({len(unread)} such tensors); biases, experts and scaled rope are not supported"
        )


def _expected_shapes(
    spec: ModelSpec, source: TensorSource, names: TensorNames
) -> Iterator[tuple[str, Shape]]:
    yield names.embedding, (spec.vocabulary, spec.hidden)
    yield names.output_norm, (spec.hidden,)
    if source.shape(names.head) is not None:
        yield names.head, (spec.vocabulary, spec.hidden)
    shapes = layer_shapes(spec)
    for index in range(spec.layers):
        yield from ((names.in_layer(index, part), shapes[part]) for part in _PARTS)


def _check_shape(source: TensorSource, name: str, expected: Shape) -> None:
    shape = source.shape(name)
    if shape is None:
        raise ModelError(f"{source.path}: tensor {name} is missing")
    if shape != expected:
        raise ModelError(f"{source.path}: tensor {name} has shape {shape}; expected {expected}")


def read_weights(
    spec: ModelSpec, source: TensorSource, names: TensorNames, progress: Progress | None
) -> ModelWeights:
    """Read all tensors (checked before); ``progress`` hears the fraction done, last 1.0."""
    report = progress or (lambda _: None)
    embedding = source.read(names.embedding)
    head = source.read(names.head) if source.shape(names.head) is not None else embedding
    weights = ModelWeights(spec, embedding, source.read(names.output_norm), head)
    for index in range(spec.layers):
        report((index + 1) / (spec.layers + 1))
        parts = {part: source.read(names.in_layer(index, part)) for part in _PARTS}
        weights.layers.append(LayerWeights(**parts))
    report(1.0)
    return weights


def read_stored_weights(
    spec: ModelSpec, source: TensorSource, names: TensorNames, progress: Progress | None
) -> StoredWeights:
    """Read embedding and head, and each layer (checked before) when it is asked for."""
    report = progress or (lambda _: None)

    def layers() -> Iterator[StoredLayer]:
        for index in range(spec.layers):
            yield _read_stored_layer(source, names, index)
            report((index + 1) / spec.layers)

    head = source.read_stored(names.head) if source.shape(names.head) is not None else None
    norm = source.read(names.output_norm)
    return StoredWeights(spec, source.read_stored(names.embedding), norm, head, layers())


def _read_stored_layer(source: TensorSource, names: TensorNames, index: int) -> StoredLayer:
    def matrix(part: str) -> Matrix:
        return source.read_stored(names.in_layer(index, part))

    return StoredLayer(
        attention_norm=source.read(names.in_layer(index, "attention_norm")),
        q=matrix("q"),
        k=matrix("k"),
        v=matrix("v"),
        o=matrix("o"),
        ffn_norm=source.read(names.in_layer(index, "ffn_norm")),
        gate=matrix("gate"),
        up=matrix("up"),
        down=matrix("down"),
    )
