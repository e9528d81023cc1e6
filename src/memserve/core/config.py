"""One frozen configuration, checked at the door and handed down in slices. Unknown fields are errors."""

from __future__ import annotations

import enum
import tomllib
from typing import Any

import msgspec

from memserve.core.errors import ConfigError

PHASES = ("pd-basic", "pd-caching-1", "pd-caching-2", "pd-caching-3", "colocated")
EVICTION = ("hit-density", "lru", "slru", "lfu", "gdsf")
WEIGHTS = ("stored", "bf16", "int8")
KV_CACHE_DTYPES = ("auto", "bf16", "int8")
SPECULATIVE_METHODS = ("off", "ngram")
RUNNERS = ("native", "reference")
OVERLAPS = ("auto", "none", "whole", "layers", "chunks")
POLICIES = (
    "round-robin",
    "least-load",
    "session-id",
    "prompt-tree",
    "cost",
    "weighted-overlap",
    "cache-aware",
    "exploit-explore",
)


class Activations(enum.StrEnum):
    """In what the inputs of matrix products are multiplied with weights of 4 and 8 bits."""

    BF16 = "bf16"
    INT8 = "int8"


class ActivationsOption(enum.StrEnum):
    """``Activations``, or what suits the processor."""

    AUTO = "auto"
    BF16 = "bf16"
    INT8 = "int8"


DEFAULT_ACTIVATIONS = ActivationsOption.AUTO


class TreeSource(enum.StrEnum):
    """From what the scheduler knows who holds which prefix."""

    EVENTS = "events"
    TTL = "ttl"


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class ModelConfig(_Section, frozen=True):
    """Which model: a path, ``smollm2-135m``, or a hub id. Clients ask for it as ``served_name``."""

    model: str = "smollm2-135m"
    served_name: str | None = None
    context: int | None = None
    runner: str = "native"


class PoolConfig(_Section, frozen=True):
    """The KV pool of each instance. ``*_memory`` in bytes; ``block_tokens`` in tokens.

    ``memory`` is where kernels read. What it has no room for goes to ``host_memory``, then to files below
    ``disk_path``, of at most ``disk_memory`` per instance, which a restart finds again.
    ``eviction`` names what decides which historical KV is given up first.
    ``kv_cache_dtype``: ``bf16``; ``int8``, which takes about half the bytes and changes answers a little;
    ``auto``: what the runner has by itself, bf16 (the reference runner: float32).
    """

    memory: int = 1 << 30
    block_tokens: int = 16
    host_memory: int = 0
    disk_path: str | None = None
    disk_memory: int = 0
    eviction: str = "hit-density"
    kv_cache_dtype: str = "auto"


class EngineConfig(_Section, frozen=True):
    """Batching. ``step_tokens`` bounds the rows of one forward pass, ``max_running`` the batch.

    ``target_tpot`` is the time in seconds between two tokens of a running stream that prefill of other
    prompts leaves it; 0 means: as much prefill as ``step_tokens`` allows, however long the streams wait.
    ``threads`` 0 means: cores divided by the instances on this machine, at least one.
    ``pin``: where the threads of all instances are as many as the cores, each instance's stay on cores of
    their own.
    ``weights``: ``stored`` keeps what the file has in 4 or 8 bits as it is; ``bf16`` expands it, which takes
    more memory and gives the same answers; ``int8`` also turns 16-bit weights into 8-bit groups.
    ``weights_cache`` is the folder for weights in the form that kernels read; ``off`` means none, and by
    default it is ``memserve`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
    ``activations``: ``int8`` multiplies weights of 4 and 8 bits as integers, which is faster and less exact;
    ``auto`` is that, or ``bf16`` on processors with AMX, whose products of bf16 are quicker.
    ``speculative_method``: ``ngram`` proposes up to ``num_speculative_tokens`` tokens per step, where they
    pay; the last ``prompt_lookup_max`` tokens of a sequence, or fewer, down to ``prompt_lookup_min``, find
    them in itself. Answers are the same as with ``off``.
    ``backflow_tokens``: a running answer's KV goes back to P at least so much at a time; 0: only at its end.
    ``overlap`` is what of a prompt's way to D goes on while it is computed: see ``engine.overlap.Overlap``.
    """

    step_tokens: int = 512
    target_tpot: float = 0.1
    max_running: int = 64
    threads: int = 0
    pin: bool = True
    weights: str = "stored"
    weights_cache: str | None = None
    activations: ActivationsOption = DEFAULT_ACTIVATIONS
    speculative_method: str = "off"
    num_speculative_tokens: int = 8
    prompt_lookup_max: int = 6
    prompt_lookup_min: int = 1
    phases: str = "pd-caching-3"
    handoff_timeout: float = 60.0
    overlap: str = "auto"
    backflow_tokens: int = 256


class ClusterConfig(_Section, frozen=True):
    """Instances to start here, and how fast silence counts as death (seconds).

    With ``restart_lost`` an instance that dies is started again, at most ``max_restarts`` times in a row.
    One that is asked to end finishes what it runs, for at most ``leave_timeout`` seconds.
    """

    prefill: int = 1
    decode: int = 1
    colocated: int = 0
    heartbeat: float = 0.25
    dead_after: float = 1.5
    start_timeout: float = 300.0
    leave_timeout: float = 30.0
    restart_lost: bool = True
    max_restarts: int = 5

    @property
    def instances(self) -> int:
        """All of them."""
        return self.prefill + self.decode + self.colocated


class TenantConfig(_Section, frozen=True):
    """One of those who share the cluster. ``weight``: its part of the tokens beside others that wait.

    Requests with ``api_key`` are its own; without one, those that name it in ``x-memserve-tenant``.
    """

    name: str
    weight: float = 1.0
    api_key: str | None = None


class ServerConfig(_Section, frozen=True):
    """HTTP. ``max_body`` in bytes; ``request_timeout`` in seconds from acceptance to the last token.

    At most ``max_waiting`` requests, of ``max_waiting_tokens`` tokens of prompts and expected answers, wait
    until instances have room, and of each tenant ``tenant_max_waiting`` of ``tenant_max_waiting_tokens``.
    ``slo_ttft``: a request whose first token would come later than so many seconds is refused; 0: none is.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_body: int = 4 << 20
    max_waiting: int = 1024
    max_waiting_tokens: int = 4 << 20
    tenant_max_waiting: int = 256
    tenant_max_waiting_tokens: int = 1 << 20
    slo_ttft: float = 0.0
    tenants: tuple[TenantConfig, ...] = ()
    request_timeout: float = 600.0
    policy: str = "cost"
    api_key: str | None = None


class SchedulerConfig(_Section, frozen=True):
    """What the scheduler believes about who holds which prefix.

    ``trees``: ``events``, pools tell what they hold; ``ttl``, the scheduler's own decisions and the answers
    to them tell, and what was not used for ``ttl_seconds`` is forgotten.
    ``speculative``: a prompt that was sent to an instance counts as coming there until its pool tells of
    it, for at most ``speculative_seconds``.
    ``tree_memory``: bytes of what is believed, about; what was used longest ago is forgotten first.
    ``decision_log``: a file for all that the scheduler is told and decides, prompts included, which is
    replaced; no more than ``decision_log_bytes``.
    """

    trees: TreeSource = TreeSource.EVENTS
    ttl_seconds: float = 300.0
    speculative: bool = True
    speculative_seconds: float = 60.0
    tree_memory: int = 1 << 30
    decision_log: str = ""
    decision_log_bytes: int = 1 << 30


class Config(_Section, frozen=True):
    """Everything ``memserve serve`` can be told."""

    model: ModelConfig = ModelConfig()
    pool: PoolConfig = PoolConfig()
    engine: EngineConfig = EngineConfig()
    cluster: ClusterConfig = ClusterConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    server: ServerConfig = ServerConfig()


def parse_config(text: str, source: str = "configuration") -> Config:
    """Parse TOML text into a checked :class:`Config`; errors name the field and ``source``."""
    try:
        return check_config(msgspec.convert(tomllib.loads(text), Config))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not valid TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {error}") from error


def override_config(config: Config, section: str, **values: Any) -> Config:
    """Return ``config`` with the non-None ``values`` set in one section."""
    given = {name: value for name, value in values.items() if value is not None}
    if not given:
        return config
    changed = msgspec.structs.replace(getattr(config, section), **given)
    return msgspec.structs.replace(config, **{section: changed})


def check_config(config: Config) -> Config:
    """Return ``config`` if every value makes sense, else raise ``ConfigError`` naming field and remedy."""
    cluster, engine, pool, server = config.cluster, config.engine, config.pool, config.server
    _check_names(config)
    _check_engine(engine)
    _require(
        engine.backflow_tokens == 0 or engine.backflow_tokens >= pool.block_tokens,
        "engine.backflow_tokens",
        engine.backflow_tokens,
        f"0 (only at the end of an answer), or at least {pool.block_tokens}, a block",
    )
    for name in ("prefill", "decode", "colocated"):
        count = getattr(cluster, name)
        _require(0 <= count <= 64, f"cluster.{name}", count, "a count from 0 to 64")
    both = (cluster.prefill > 0) == (cluster.decode > 0)
    _require(
        both,
        "cluster.prefill/decode",
        f"{cluster.prefill}/{cluster.decode}",
        "both at least 1, or both 0 with colocated instances",
    )
    _require(
        engine.phases != "colocated" or cluster.prefill == 0,
        "engine.phases",
        engine.phases,
        "one of the pd-* rows where there are prefill and decode instances",
    )
    some = cluster.instances > 0
    _require(some, "cluster", "0 instances", "at least one colocated, or one prefill and one decode")
    _check_pool(pool)
    _check_scheduler(config.scheduler)
    _require(0 <= server.port <= 65535, "server.port", server.port, "0 (any free port) to 65535")
    _require(server.max_body >= 1024, "server.max_body", server.max_body, "at least 1024 bytes")
    _require(
        server.request_timeout > 0,
        "server.request_timeout",
        server.request_timeout,
        "a positive number of seconds",
    )
    _check_line(server)
    for name in ("heartbeat", "dead_after", "start_timeout", "leave_timeout"):
        value = getattr(cluster, name)
        _require(value > 0, f"cluster.{name}", value, "a positive number of seconds")
    _require(cluster.max_restarts >= 0, "cluster.max_restarts", cluster.max_restarts, "0 (never) or more")
    _require(
        cluster.dead_after >= 2 * cluster.heartbeat,
        "cluster.dead_after",
        cluster.dead_after,
        "at least two heartbeats",
    )
    return config


def _check_line(server: ServerConfig) -> None:
    """How many may wait, how long, and for whom."""
    for name in ("max_waiting", "max_waiting_tokens", "tenant_max_waiting", "tenant_max_waiting_tokens"):
        count = getattr(server, name)
        _require(count >= 1, f"server.{name}", count, "at least 1")
    slo = server.slo_ttft
    _require(0 <= slo <= 86_400, "server.slo_ttft", slo, "0 (none) to 86400 seconds")
    for field in ("name", "api_key"):
        given = [value for tenant in server.tenants if (value := getattr(tenant, field)) is not None]
        # Keys are secrets: the message does not show them.
        unique = len(given) == len(set(given)) and all(given)
        _require(unique, f"server.tenants.{field}", "empty or there twice", "one of its own for each tenant")
    for tenant in server.tenants:
        where = f"server.tenants ({tenant.name}) weight"
        _require(1e-3 <= tenant.weight <= 1e3, where, tenant.weight, "0.001 to 1000")
        taken = tenant.api_key is not None and tenant.api_key == server.api_key
        _require(not taken, f"server.tenants ({tenant.name}) api_key", "server.api_key", "a key of its own")


def _check_names(config: Config) -> None:
    """The fields that name one of a few things."""
    engine = config.engine
    for field, value, accepted in (
        ("model.runner", config.model.runner, RUNNERS),
        ("engine.phases", engine.phases, PHASES),
        ("engine.weights", engine.weights, WEIGHTS),
        ("engine.speculative_method", engine.speculative_method, SPECULATIVE_METHODS),
        ("engine.overlap", engine.overlap, OVERLAPS),
        ("server.policy", config.server.policy, POLICIES),
        ("pool.eviction", config.pool.eviction, EVICTION),
        ("pool.kv_cache_dtype", config.pool.kv_cache_dtype, KV_CACHE_DTYPES),
    ):
        _require(value in accepted, field, value, f"one of {', '.join(accepted)}")


def _check_pool(pool: PoolConfig) -> None:
    _require(pool.block_tokens == 16, "pool.block_tokens", pool.block_tokens, "16 (the kernels' block size)")
    _require(pool.memory >= 1 << 20, "pool.memory", pool.memory, "at least 1 MiB")
    _require(pool.host_memory >= 0, "pool.host_memory", pool.host_memory, "0 (no host tier) or more bytes")
    _require(
        pool.disk_path is None or pool.disk_memory >= 1 << 20,
        "pool.disk_memory",
        pool.disk_memory,
        "at least 1 MiB where pool.disk_path is set",
    )
    _require(
        pool.disk_path is not None or pool.disk_memory == 0,
        "pool.disk_memory",
        pool.disk_memory,
        "0, or a size together with pool.disk_path",
    )


def _check_scheduler(scheduler: SchedulerConfig) -> None:
    for name in ("ttl_seconds", "speculative_seconds"):
        seconds = getattr(scheduler, name)
        _require(seconds > 0, f"scheduler.{name}", seconds, "a positive number of seconds")
    memory = scheduler.tree_memory
    _require(memory >= 1 << 20, "scheduler.tree_memory", memory, "at least 1 MiB")


def _check_engine(engine: EngineConfig) -> None:
    _require(engine.step_tokens >= 16, "engine.step_tokens", engine.step_tokens, "at least 16")
    paced = 0 <= engine.target_tpot <= 60
    _require(paced, "engine.target_tpot", engine.target_tpot, "0 (no pacing) to 60 seconds")
    _require(engine.max_running >= 1, "engine.max_running", engine.max_running, "at least 1")
    _require(engine.threads >= 0, "engine.threads", engine.threads, "0 (automatic) or more")
    most, least = engine.prompt_lookup_max, engine.prompt_lookup_min
    tokens = engine.num_speculative_tokens
    _require(1 <= tokens <= 16, "engine.num_speculative_tokens", tokens, "1 to 16")
    _require(1 <= most <= 16, "engine.prompt_lookup_max", most, "1 to 16")
    _require(1 <= least <= most, "engine.prompt_lookup_min", least, "1 to engine.prompt_lookup_max")


def _require(condition: bool, field: str, value: object, accepted: str) -> None:
    if not condition:
        raise ConfigError(f"{field} is {value!r}; accepted: {accepted}")
