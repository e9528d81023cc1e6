"""config.json of a Hugging Face folder: which models are supported, and what their settings mean.

Defaults are those of transformers' configuration classes: files may leave out whatever equals them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from memserve.core.errors import ModelError
from memserve.engine.models.rope import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling
from memserve.engine.models.safetensors_folder import parse_json
from memserve.engine.models.spec import ModelSpec

Eos = int | list[int] | None
_Stretch = Annotated[float, msgspec.Meta(ge=1, le=1e6)]
_Positive = Annotated[float, msgspec.Meta(gt=0, le=1e9)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]


@dataclass(frozen=True, slots=True)
class _Architecture:
    """What the name of an architecture implies.

    ``head_dim`` None: hidden size / heads. ``window`` says when ``sliding_window`` counts: ``never``,
    ``always``, or if ``switched`` on.
    """

    family: str
    bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    window: str = "never"


_ARCHITECTURES = {
    "LlamaForCausalLM": _Architecture("llama"),
    "MistralForCausalLM": _Architecture("mistral", window="always"),
    "Qwen2ForCausalLM": _Architecture("qwen2", bias=True, window="switched"),
    "Qwen3ForCausalLM": _Architecture("qwen3", qk_norm=True, head_dim=128, window="switched"),
}
_DEFAULT_WINDOW = 4096


class Rope(msgspec.Struct, frozen=True):
    """Rotary settings, in the older (``type``) and the newer (``rope_type``) spelling."""

    type: str = "default"
    rope_type: str | None = None
    rope_theta: float | None = None
    factor: _Stretch | None = None
    low_freq_factor: _Positive | None = None
    high_freq_factor: _Positive | None = None
    original_max_position_embeddings: _Count | None = None
    attention_factor: _Positive | None = None
    beta_fast: _Positive | None = None
    beta_slow: _Positive | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    partial_rotary_factor: float = 1.0

    @property
    def kind(self) -> str:
        return self.rope_type or self.type


class HFConfig(msgspec.Struct, frozen=True):
    """The fields that decide what is computed."""

    architectures: list[str]
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int = 2048
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = None
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    partial_rotary_factor: float = 1.0
    sliding_window: int | None = _DEFAULT_WINDOW
    use_sliding_window: bool = False
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    eos_token_id: Eos = None
    quantization_config: dict[str, Any] | None = None

    @property
    def rope(self) -> Rope:
        return self.rope_parameters or self.rope_scaling or Rope()

    @property
    def architecture(self) -> _Architecture:
        """The first one that is supported; there is one, or ``read_config`` would have refused."""
        return _ARCHITECTURES[next(name for name in self.architectures if name in _ARCHITECTURES)]


def read_config(path: Path, raw: bytes) -> HFConfig:
    """Parse config.json; raises ``ModelError`` naming the field that is wrong or not supported."""
    config = parse_json(path, raw, HFConfig)
    if not any(name in _ARCHITECTURES for name in config.architectures):
        raise ModelError(
            f"{path}: architecture {', '.join(config.architectures) or 'unknown'} is not supported "
            f"(architectures; supported: {', '.join(_ARCHITECTURES)})"
        )
    if config.quantization_config is not None:
        raise ModelError(
            f"{path}: quantised safetensors are not supported (quantization_config); "
            "use the unquantised model, or a GGUF file of it"
        )
    if config.hidden_act != "silu":
        raise ModelError(f"{path}: hidden_act {config.hidden_act!r} is not supported (supported: silu)")
    if config.attention_bias or config.mlp_bias:
        raise ModelError(
            f"{path}: biases of output and feed-forward projections are not supported "
            "(attention_bias, mlp_bias; supported: those of q, k and v in Qwen2ForCausalLM)"
        )
    if config.partial_rotary_factor != 1 or config.rope.partial_rotary_factor != 1:
        raise ModelError(f"{path}: partial_rotary_factor must be 1; partly rotated heads are not supported")
    return config


def read_spec(path: Path, config: HFConfig, *, identity: str, eos_tokens: tuple[int, ...]) -> ModelSpec:
    """What ``config`` says, still to be checked against the tensors. Raises ``ModelError``."""
    architecture, heads, rope = config.architecture, config.num_attention_heads, config.rope
    scaling, window = _read_scaling(path, config), _read_window(config)
    context = config.max_position_embeddings
    if isinstance(scaling, YarnScaling):
        context = int(scaling.factor * scaling.original_context)
    return ModelSpec(
        identity=identity,
        architecture=architecture.family,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=config.num_key_value_heads or heads,
        head_dim=config.head_dim or architecture.head_dim or config.hidden_size // max(heads, 1),
        feed_forward=config.intermediate_size,
        vocabulary=config.vocab_size,
        context=min(context, window) if window else context,
        rms_epsilon=config.rms_norm_eps,
        rope_theta=rope.rope_theta or config.rope_theta or 10000.0,
        eos_tokens=eos_tokens,
        rope_scaling=scaling,
        window=window,
        attention_bias=architecture.bias,
        qk_norm=architecture.qk_norm,
    )


def _read_window(config: HFConfig) -> int | None:
    use = config.architecture.window
    if use == "never" or (use == "switched" and not config.use_sliding_window):
        return None
    slides = config.max_window_layers < config.num_hidden_layers
    if config.layer_types is not None:
        slides = "sliding_attention" in config.layer_types
    return config.sliding_window if slides or use == "always" else None


def _read_scaling(path: Path, config: HFConfig) -> RopeScaling | None:
    rope = config.rope
    if rope.kind == "default":
        return None
    if rope.kind not in ("linear", "llama3", "yarn"):
        raise ModelError(
            f"{path}: rope scaling {rope.kind!r} is not supported "
            "(rope_scaling or rope_parameters; supported: default, linear, llama3, yarn)"
        )
    factor = _required(path, rope, "factor", rope.factor)
    original = rope.original_max_position_embeddings or config.max_position_embeddings
    if rope.kind == "linear":
        return LinearScaling(factor)
    if rope.kind == "yarn":
        return _yarn(path, rope, factor, original)
    low = _required(path, rope, "low_freq_factor", rope.low_freq_factor)
    high = _required(path, rope, "high_freq_factor", rope.high_freq_factor)
    if high <= low:
        raise ModelError(f"{path}: high_freq_factor is {high}; it must be above low_freq_factor, {low}")
    return Llama3Scaling(factor, low, high, original)


def _yarn(path: Path, rope: Rope, factor: float, original: int) -> YarnScaling:
    if rope.mscale or rope.mscale_all_dim or not rope.truncate:
        raise ModelError(
            f"{path}: YaRN with mscale, mscale_all_dim or truncate is not supported (rope_scaling)"
        )
    return YarnScaling(factor, original, rope.beta_fast or 32, rope.beta_slow or 1, rope.attention_factor)


def _required(path: Path, rope: Rope, field: str, value: float | None) -> float:
    if value is None:
        raise ModelError(f"{path}: rope scaling {rope.kind!r} needs {field} (rope_scaling)")
    return value
