"""How fast simulated instances are: by published figures, by a file, or as a running server has measured.

Published: a roofline. Prefill and the rows of a batch are bound by arithmetic, a step's weights and the KV
that rows attend to by memory, both at half of what data sheets say. Whoever has measured prices should use
those.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from memserve.core.errors import ConfigError
from memserve.core.types import Role, StepPrices
from memserve.scheduler.costs import Wire
from memserve.server.views import ClusterBody, InstanceBody
from memserve.sim.steps import Speed

_ATTAINED = 0.5
"""Share of the data sheets' peaks, of arithmetic and of memory alike."""
_USABLE_MEMORY = 0.9
_WEIGHT_BYTES = 2
_GPU_STEP_TOKENS = 8192
_TARGET_TPOT = 0.1


@dataclass(frozen=True, slots=True)
class Profile:
    """What instances can do, where that is known from, and how many tokens of KV one has room for.

    ``decode_speed``: of those that only decode, where that is known to be another.
    """

    name: str
    source: str
    speed: Speed
    wire: Wire
    kv_tokens: int
    decode_speed: Speed | None = None


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A data sheet: FLOP/s in bf16 without sparsity, bytes/s and bytes of memory, bytes/s of a port."""

    name: str
    flops: float
    bandwidth: float
    memory: float
    link: float


@dataclass(frozen=True, slots=True)
class Architecture:
    """A dense transformer; ``kv_bytes`` per token, all layers."""

    name: str
    parameters: float
    layers: int
    hidden: int
    kv_bytes: int


class SpeedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Measured prices in a file: the fields of ``StepPrices`` in seconds, and what instances are like.

    ``bandwidth`` (bytes/s) and ``latency`` (s) are those of transfers between instances.
    """

    step: float
    row: float
    row_context: float
    token: float
    token_context: float
    kv_tokens: int
    proposed: float = 0.0
    step_tokens: int = 512
    target_tpot: float = _TARGET_TPOT
    kv_bytes_per_token: float = 0.0
    bandwidth: float = 2e9
    latency: float = 2e-3


_A800 = Accelerator("A800 80 GB", 312e12, 2.039e12, 80e9, 12.5e9)
_H100 = Accelerator("H100 SXM 80 GB", 989e12, 3.35e12, 80e9, 50e9)
_LLAMA_70B = Architecture("Llama 3 70B", 70.6e9, 80, 8192, 80 * 2 * 1024 * _WEIGHT_BYTES)
_LLAMA_8B = Architecture("Llama 3 8B", 8.03e9, 32, 4096, 32 * 2 * 1024 * _WEIGHT_BYTES)


def roofline(name: str, accelerator: Accelerator, count: int, model: Architecture) -> Profile:
    """A ``model`` in bf16 on ``count`` accelerators: 2 FLOP per parameter and token, 4 per layer, hidden unit
    and pair of tokens (both products of attention)."""
    flops, bandwidth = (_ATTAINED * count * peak for peak in (accelerator.flops, accelerator.bandwidth))
    token = 2 * model.parameters / flops
    weights = model.parameters * _WEIGHT_BYTES
    prices = StepPrices(
        step=weights / bandwidth,
        row=token,
        row_context=model.kv_bytes / bandwidth,
        proposed=token,
        token=token,
        token_context=4 * model.layers * model.hidden / flops,
    )
    return Profile(
        name,
        f"roofline of {model.name} in bf16, {count} x {accelerator.name} at {_ATTAINED:.0%} of peak",
        Speed(prices, _GPU_STEP_TOKENS, _TARGET_TPOT),
        Wire(model.kv_bytes, accelerator.link),
        int((count * accelerator.memory * _USABLE_MEMORY - weights) / model.kv_bytes),
    )


PROFILES = {
    one.name: one
    for one in (
        roofline("a800x8-70b", _A800, 8, _LLAMA_70B),
        roofline("h100x8-70b", _H100, 8, _LLAMA_70B),
        roofline("h100-8b", _H100, 1, _LLAMA_8B),
        Profile(
            "cpu-135m",
            "SmolLM2-135M on two slow cores, as an instance believes before it has measured itself",
            Speed(StepPrices(), 512, _TARGET_TPOT),
            Wire(30 * 2 * 192 * _WEIGHT_BYTES),
            16_384,
        ),
    )
}
DEFAULT_PROFILE = "a800x8-70b"


def profile_by_name(asked: str) -> Profile:
    """A published profile, or the one in the JSON file ``asked``. Raises ``ConfigError``."""
    if asked in PROFILES:
        return PROFILES[asked]
    if not asked.endswith(".json"):
        raise ConfigError(f"--speed is {asked!r}; accepted: {', '.join(PROFILES)}, or a file FILE.json")
    try:
        known = msgspec.json.decode(Path(asked).read_bytes(), type=SpeedFile)
    except OSError as error:
        raise ConfigError(f"--speed: {asked} cannot be read: {error.strerror or error}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"--speed: {asked} is no file of prices: {error}") from error
    return _of_file(known, asked)


def profile_of_cluster(body: ClusterBody, url: str) -> Profile:
    """The median of what a server's instances have measured of themselves. Raises ``ConfigError``.

    Those that only decode stand for their like: who prefills beside streams measures other prices.
    """
    measured = [one for one in body.instances if one.prices]
    if not measured:
        raise ConfigError(f"no instance of {url} has measured its steps yet; send it some requests first")
    decode = [one for one in measured if one.role == Role.DECODE]
    return Profile(
        body.model,
        f"medians of what {len(measured)} instances of {url} have measured",
        _median_speed([one for one in measured if one not in decode] or decode),
        Wire(body.block_bytes / body.block_tokens),
        int(_median([one.blocks.total * body.block_tokens for one in measured])),
        _median_speed(decode) if decode else None,
    )


def _median_speed(instances: Sequence[InstanceBody]) -> Speed:
    told = [one.prices for one in instances if one.prices]
    fields = StepPrices.__struct_fields__
    prices = StepPrices(*(_median([one[field] for one in told]) for field in fields))
    return Speed(prices, target_tpot=_TARGET_TPOT)


def _of_file(known: SpeedFile, file: str) -> Profile:
    prices = StepPrices(*(getattr(known, field) for field in StepPrices.__struct_fields__))
    if not (prices.step > 0 and prices.token > 0 and known.kv_tokens > 0 and known.bandwidth > 0):
        raise ConfigError(f"--speed: {file}: step, token, kv_tokens and bandwidth must be more than 0")
    speed = Speed(prices, known.step_tokens, known.target_tpot)
    wire = Wire(known.kv_bytes_per_token, known.bandwidth, known.latency)
    return Profile(Path(file).stem, f"prices of {file}", speed, wire, known.kv_tokens)


def _median(values: Sequence[float]) -> float:
    return float(statistics.median(values))
