"""``memserve serve``: from options and a file to one checked configuration, and off it goes."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import typer

from memserve.cli import serve_options as options
from memserve.cli.failure import BAD_USAGE, CANNOT, fail
from memserve.cli.sizes import parse_size
from memserve.core.config import (
    ActivationsOption,
    Config,
    TreeSource,
    check_config,
    override_config,
    parse_config,
)
from memserve.core.errors import ConfigError, MemServeError, ModelError

DEFAULT_DISK = 4 << 30
"""Bytes per instance where ``--disk`` names a folder and nothing says how much."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What the command line says; None means: not said."""

    model: str | None = None
    served_name: str | None = None
    context: int | None = None
    runner: str | None = None
    weights: str | None = None
    weights_cache: str | None = None
    activations: ActivationsOption | None = None
    speculative_method: str | None = None
    num_speculative_tokens: int | None = None
    prefill: int | None = None
    decode: int | None = None
    colocated: int | None = None
    phases: str | None = None
    policy: str | None = None
    trees: TreeSource | None = None
    decision_log: str | None = None
    kv_memory: str | None = None
    kv_cache_dtype: str | None = None
    host_memory: str | None = None
    disk: str | None = None
    disk_memory: str | None = None
    restart_lost: bool | None = None
    threads: int | None = None
    pin: bool | None = None
    target_tpot: float | None = None
    host: str | None = None
    port: int | None = None
    request_timeout: float | None = None
    slo_ttft: float | None = None
    api_key: str | None = None


def serve(
    model: options.Model = None,
    served_name: options.ServedName = None,
    context: options.Context = None,
    runner: options.Runner = None,
    weights: options.Weights = None,
    weights_cache: options.WeightsCache = None,
    activations: options.Activations = None,
    speculative_method: options.SpeculativeMethod = None,
    num_speculative_tokens: options.NumSpeculativeTokens = None,
    prefill: options.Prefill = None,
    decode: options.Decode = None,
    colocated: options.Colocated = None,
    phases: options.Phases = None,
    policy: options.Policy = None,
    trees: options.Trees = None,
    decision_log: options.DecisionLog = None,
    kv_memory: options.KvMemory = None,
    kv_cache_dtype: options.KvCacheDtype = None,
    host_memory: options.HostMemory = None,
    disk: options.Disk = None,
    disk_memory: options.DiskMemory = None,
    restart_lost: options.RestartLost = None,
    threads: options.Threads = None,
    pin: options.Pin = None,
    target_tpot: options.TargetTpot = None,
    host: options.Host = None,
    port: options.Port = None,
    request_timeout: options.RequestTimeout = None,
    slo_ttft: options.SloTtft = None,
    api_key: options.ApiKey = None,
    config: options.Config = None,
) -> None:
    """Serve a model; ``HELP`` says it to users."""
    given = ServeOptions(
        model=model, served_name=served_name, context=context, runner=runner, weights=weights,
        weights_cache=weights_cache, activations=activations, speculative_method=speculative_method,
        num_speculative_tokens=num_speculative_tokens, prefill=prefill, decode=decode, colocated=colocated,
        phases=phases, policy=policy, trees=trees, decision_log=decision_log, kv_memory=kv_memory,
        kv_cache_dtype=kv_cache_dtype,
        host_memory=host_memory, disk=disk, disk_memory=disk_memory, restart_lost=restart_lost,
        threads=threads, pin=pin, target_tpot=target_tpot, host=host, port=port,
        request_timeout=request_timeout, slo_ttft=slo_ttft,
        api_key=api_key or None,
    )  # fmt: skip
    try:
        checked = build_config(given, config)
    except ConfigError as error:
        fail(error, BAD_USAGE)
    _run(checked)


def build_config(said: ServeOptions, file: Path | None) -> Config:
    """The configuration that options over file over defaults make. Raises ``ConfigError``."""
    config = Config() if file is None else _read_file(file)
    config = override_config(
        config,
        "model",
        model=said.model,
        served_name=said.served_name,
        context=said.context,
        runner=said.runner,
    )
    config = override_config(config, "pool", **_pool(said))
    config = override_config(
        config,
        "engine",
        threads=said.threads,
        pin=said.pin,
        phases=said.phases,
        weights=said.weights,
        weights_cache=said.weights_cache,
        activations=said.activations,
        speculative_method=said.speculative_method,
        num_speculative_tokens=said.num_speculative_tokens,
        target_tpot=said.target_tpot,
    )
    config = override_config(config, "cluster", restart_lost=said.restart_lost, **_counts(said))
    config = override_config(config, "scheduler", trees=said.trees, decision_log=said.decision_log)
    config = override_config(
        config,
        "server",
        host=said.host,
        port=said.port,
        request_timeout=said.request_timeout,
        slo_ttft=said.slo_ttft,
        policy=said.policy,
        api_key=said.api_key,
    )
    return check_config(config)


def _pool(said: ServeOptions) -> dict[str, int | str | None]:
    """Sizes of the tiers and what is in them; a disk without a size gets the default one."""
    sizes = {
        "memory": (said.kv_memory, "--kv-memory"),
        "host_memory": (said.host_memory, "--host-memory"),
        "disk_memory": (said.disk_memory, "--disk-memory"),
    }
    pool: dict[str, int | str | None] = {
        field: None if size is None else parse_size(size, option) for field, (size, option) in sizes.items()
    }
    if said.disk is not None and pool["disk_memory"] is None:
        pool["disk_memory"] = DEFAULT_DISK
    return pool | {"disk_path": said.disk, "kv_cache_dtype": said.kv_cache_dtype}


def _counts(said: ServeOptions) -> dict[str, int | None]:
    """Instances by role; ``--colocated`` given alone means no others."""
    alone = bool(said.colocated) and said.prefill is None and said.decode is None
    others = 0 if alone else None
    return {
        "prefill": others if said.prefill is None else said.prefill,
        "decode": others if said.decode is None else said.decode,
        "colocated": said.colocated,
    }


def _read_file(file: Path) -> Config:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file} cannot be read: {error}") from error
    return parse_config(text, str(file))


def _run(config: Config) -> None:
    from memserve.cluster.spawning import end_spare, spawn

    # First of all: while this process loads its own code, theirs is loaded too.
    spare = [spawn() for _ in range(config.cluster.instances)]
    # Loading makes many objects and no garbage: collections would take a seventh of its time.
    gc.disable()
    try:
        _serve(config, spare)
    finally:
        gc.enable()
        end_spare(spare)


def _serve(config: Config, spare: list[Popen[bytes]]) -> None:
    from rich.console import Console

    from memserve.cli.screen import open_screen
    from memserve.server.serve import run

    screen = open_screen(Console(stderr=True), Console())
    try:
        run(config, screen, spare)
    except (ConfigError, ModelError) as error:
        fail(error, BAD_USAGE)
    except MemServeError as error:
        fail(error, CANNOT)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
