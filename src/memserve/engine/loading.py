"""From a configured model to a runner that can compute: weights from the cache, or packed now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from memserve.core.config import Activations, ActivationsOption, Config
from memserve.engine.context import context_of
from memserve.engine.models.packed import PackedOrigin, PackedWeights
from memserve.engine.models.resolve import resolve_model
from memserve.engine.models.spec import ModelSpec, StoredWeights
from memserve.engine.runners.base import Runner
from memserve.engine.weights_cache import open_cache

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run; ``context`` in tokens."""

    spec: ModelSpec
    context: int
    runner: Runner


def load_model(config: Config, threads: int, cores: Sequence[int], progress: Progress) -> LoadedModel:
    """Find the model and build the configured runner; slow, for a worker thread.

    ``cores``: see ``NativeRunner``.

    Raises ``ModelError`` or ``ConfigError`` naming what is wrong.
    """
    path = resolve_model(config.model.model)

    def reading(done: float) -> None:
        progress("reading weights", done)

    if config.model.runner == "reference":
        # Readers of model files take longer to import than packed weights to be mapped.
        from memserve.engine.models.loader import open_path
        from memserve.engine.runners.reference import ReferenceRunner

        source = open_path(path)
        context = context_of(source.spec, config.model)
        return LoadedModel(
            source.spec,
            context,
            ReferenceRunner(source.weights(reading), layout_dtype=_kv_dtype(config) or "f32"),
        )
    return load_native(path, config, threads, cores, reading)


def load_native(
    path: Path, config: Config, threads: int, cores: Sequence[int], reading: Callable[[float], None]
) -> LoadedModel:
    """The native runner, on weights from the cache where it has them; else packed now, and kept there."""
    from memserve import _native
    from memserve.engine.runners.native import NativeRunner

    keep = config.engine.weights

    def build(weights: StoredWeights | PackedWeights) -> tuple[LoadedModel, NativeRunner]:
        context = context_of(weights.spec, config.model)
        runner = NativeRunner(
            weights,
            threads=threads,
            context=context,
            cores=cores,
            keep=keep,
            activations=_activations(config, _native.isa()),
            kv_dtype=_kv_dtype(config) or "bf16",
        )
        return LoadedModel(weights.spec, context, runner), runner

    cache = open_cache(config.engine.weights_cache)
    if cache is None:
        return build(_read(path, reading))[0]
    origin = PackedOrigin.of(path, keep)
    kept = cache.find(origin)
    if kept is None:
        loaded, runner = build(_read(path, reading))
        kept = cache.store(origin, runner.packed())
        if kept is None:
            return loaded
        # The copy on disk is shared with other instances; the one in this process's own memory can go.
        runner.close()
    return build(kept)[0]


def _read(path: Path, reading: Callable[[float], None]) -> StoredWeights:
    from memserve.engine.models.loader import open_path

    return open_path(path).stored_weights(reading)


def _activations(config: Config, isa: str) -> Activations:
    """What is asked for, or what suits the machine."""
    asked = config.engine.activations
    if asked is not ActivationsOption.AUTO:
        return Activations(asked)
    return Activations.BF16 if isa.startswith("amx") else Activations.INT8


def _kv_dtype(config: Config) -> str | None:
    """What is asked for; None: whatever suits the runner."""
    return None if config.pool.kv_cache_dtype == "auto" else config.pool.kv_cache_dtype
