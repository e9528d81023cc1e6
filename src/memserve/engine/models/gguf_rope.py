"""What a GGUF file says about scaled rotary embeddings. Keys and defaults are llama.cpp's."""

from __future__ import annotations

from memserve.engine.models.gguf_metadata import Metadata
from memserve.engine.models.rope import FrequencyDivisors, LinearScaling, RopeScaling, YarnScaling
from memserve.engine.models.spec import Float

_TYPES = "none, linear, yarn, or Llama 3's tensor rope_freqs.weight"
_UNKNOWN_YARN = (
    ".rope.scaling.yarn_log_multiplier",
    ".rope.scaling.yarn_ext_factor",
    ".rope.scaling.yarn_attn_factor",
)


def read_rope_scaling(metadata: Metadata, divisors: Float | None) -> RopeScaling | None:
    """The file's scaling, or None; ``divisors`` is its tensor ``rope_freqs.weight``, if there is one.

    Raises ``ModelError`` for kinds that are not supported.
    """
    # A factor without a type means linear, and older files spell the factor scale_linear.
    kind = metadata.text(".rope.scaling.type", "linear")
    factor = metadata.number(".rope.scaling.factor", metadata.number(".rope.scale_linear", 1.0)) or 1.0
    if kind not in ("none", "linear", "yarn"):
        raise metadata.complain(".rope.scaling.type", f"{_TYPES} (other kinds are not supported)")
    if divisors is not None:
        if kind == "yarn" or (kind == "linear" and factor != 1.0):
            raise metadata.fail(f"rope_freqs.weight together with {kind} rope scaling is not supported")
        return FrequencyDivisors(tuple(divisors.tolist()))
    if kind == "yarn":
        return _read_yarn(metadata, factor)
    return LinearScaling(factor) if kind == "linear" and factor != 1.0 else None


def _read_yarn(metadata: Metadata, factor: float) -> YarnScaling:
    for key in _UNKNOWN_YARN:
        if key in metadata:
            raise metadata.complain(key, "no such key (this variant of YaRN is not supported)")
    original = metadata.integer(".rope.scaling.original_context_length", metadata.integer(".context_length"))
    plain = YarnScaling(
        factor,
        original,
        metadata.number(".rope.scaling.yarn_beta_fast", 32.0),
        metadata.number(".rope.scaling.yarn_beta_slow", 1.0),
    )
    if not (1 <= factor <= 1e6 and original >= 1 and 0 < plain.beta_slow <= plain.beta_fast < 1e6):
        raise metadata.fail(f"rope scaling {plain} does not make sense (keys *.rope.scaling.*)")
    # llama.cpp multiplies the paper's attention factor by the file's.
    multiplier = metadata.number(".rope.scaling.attn_factor", 1.0)
    return YarnScaling(
        factor, original, plain.beta_fast, plain.beta_slow, attention_factor=plain.amplitude * multiplier
    )
