"""How long sequences may get: the model's context, or less where the configuration says so."""

from __future__ import annotations

import logging

from memserve.core.config import ModelConfig
from memserve.core.errors import ConfigError
from memserve.engine.models.spec import ModelSpec

log = logging.getLogger(__name__)


def context_of(spec: ModelSpec, config: ModelConfig) -> int:
    """The longest sequence to serve, in tokens. Raises ``ConfigError`` beyond the model's own context."""
    asked = config.context or spec.context
    if not 2 <= asked <= spec.context:
        limit = f"{spec.context} for this model"
        if spec.context == spec.window:
            limit += ", its sliding window (attention beyond it is not supported)"
        raise ConfigError(f"model.context is {asked}; accepted: 2 to {limit}")
    if not config.context and spec.context == spec.window:
        log.warning("context: %d tokens, the model's sliding window; beyond it is not supported", asked)
    return asked
