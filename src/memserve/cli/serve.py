"""``memserve serve``: from options and a file to one checked configuration, and off it goes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from memserve.cli.failure import BAD_USAGE, CANNOT, fail
from memserve.cli.sizes import parse_size
from memserve.core.config import (
    PHASES,
    POLICIES,
    Config,
    check_config,
    override_config,
    parse_config,
)
from memserve.core.errors import ConfigError, MemServeError, ModelError

_MODEL, _INSTANCES, _HTTP = "Model", "Instances", "HTTP"


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What the command line says; None means: not said."""

    model: str | None = None
    served_name: str | None = None
    context: int | None = None
    runner: str | None = None
    prefill: int | None = None
    decode: int | None = None
    colocated: int | None = None
    phases: str | None = None
    policy: str | None = None
    kv_memory: str | None = None
    threads: int | None = None
    host: str | None = None
    port: int | None = None
    api_key: str | None = None


def serve(
    model: Annotated[
        str | None,
        typer.Option(
            help="What to serve: [bold]smollm2-135m[/] (the default, installed with MemServe's model group), a "
            "GGUF file, a folder with config.json and safetensors, or a hub id org/name.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    served_name: Annotated[
        str | None, typer.Option(help="The name clients ask for.", rich_help_panel=_MODEL)
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Longest prompt and answer together, tokens.", rich_help_panel=_MODEL),
    ] = None,
    runner: Annotated[
        str | None,
        typer.Option(
            help="[bold]native[/]: C++ kernels (default). [bold]reference[/]: numpy, slow and exact.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    prefill: Annotated[
        int | None,
        typer.Option(help="Instances that only read prompts. Default 1.", rich_help_panel=_INSTANCES),
    ] = None,
    decode: Annotated[
        int | None,
        typer.Option(help="Instances that only write answers. Default 1.", rich_help_panel=_INSTANCES),
    ] = None,
    colocated: Annotated[
        int | None,
        typer.Option(
            help="Instances that do both. Given alone, there are no others.", rich_help_panel=_INSTANCES
        ),
    ] = None,
    phases: Annotated[
        str | None,
        typer.Option(
            help="What is kept and what is moved after prefill and decode: "
            f"{', '.join(PHASES)}. Default pd-caching-3: everything is kept, and answers flow back.",
            rich_help_panel=_INSTANCES,
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help=f"Who gets a request: {', '.join(POLICIES)}. Default prompt-tree: whoever holds most of it.",
            rich_help_panel=_INSTANCES,
        ),
    ] = None,
    kv_memory: Annotated[
        str | None,
        typer.Option(
            help="KV memory of each instance, for example 512MiB. Default 1GiB.",
            metavar="SIZE",
            rich_help_panel=_INSTANCES,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            help="Threads of each instance. Default: cores divided by instances.",
            rich_help_panel=_INSTANCES,
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Address to listen on. Default 127.0.0.1.", rich_help_panel=_HTTP),
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port. Default 8000; 0 takes a free one.", rich_help_panel=_HTTP)
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="MEMSERVE_API_KEY",
            help="Key that clients must send. Better given in the environment than on the command line.",
            rich_help_panel=_HTTP,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file with any of this and more (docs/api.md); options here win over it."),
    ] = None,
) -> None:
    """Serve a model over an OpenAI-compatible API.

    Without options: SmolLM2-135M-Instruct, one prefill and one decode instance, at
    http://127.0.0.1:8000. Ctrl-C stops everything.

    Examples:

      memserve serve --port 9000 --kv-memory 2GiB

      memserve serve --prefill 2 --decode 2 --policy least-load

      memserve serve --colocated 1 --model ~/models/my-llama.gguf
    """
    options = ServeOptions(
        model=model,
        served_name=served_name,
        context=context,
        runner=runner,
        prefill=prefill,
        decode=decode,
        colocated=colocated,
        phases=phases,
        policy=policy,
        kv_memory=kv_memory,
        threads=threads,
        host=host,
        port=port,
        api_key=api_key or None,
    )
    try:
        checked = build_config(options, config)
    except ConfigError as error:
        fail(error, BAD_USAGE)
    _run(checked)


def build_config(options: ServeOptions, file: Path | None) -> Config:
    """The configuration that options over file over defaults make. Raises ``ConfigError``."""
    config = Config() if file is None else _read_file(file)
    memory = None if options.kv_memory is None else parse_size(options.kv_memory, "--kv-memory")
    config = override_config(
        config,
        "model",
        model=options.model,
        served_name=options.served_name,
        context=options.context,
        runner=options.runner,
    )
    config = override_config(config, "pool", memory=memory)
    config = override_config(config, "engine", threads=options.threads, phases=options.phases)
    config = override_config(config, "cluster", **_counts(options))
    config = override_config(
        config,
        "server",
        host=options.host,
        port=options.port,
        policy=options.policy,
        api_key=options.api_key,
    )
    return check_config(config)


def _counts(options: ServeOptions) -> dict[str, int | None]:
    """Instances by role; ``--colocated`` given alone means no others."""
    alone = bool(options.colocated) and options.prefill is None and options.decode is None
    others = 0 if alone else None
    return {
        "prefill": others if options.prefill is None else options.prefill,
        "decode": others if options.decode is None else options.decode,
        "colocated": options.colocated,
    }


def _read_file(file: Path) -> Config:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file} cannot be read: {error}") from error
    return parse_config(text, str(file))


def _run(config: Config) -> None:
    from rich.console import Console

    from memserve.cli.screen import open_screen
    from memserve.server.serve import run

    screen = open_screen(Console(stderr=True), Console())
    try:
        run(config, screen)
    except (ConfigError, ModelError) as error:
        fail(error, BAD_USAGE)
    except MemServeError as error:
        fail(error, CANNOT)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
