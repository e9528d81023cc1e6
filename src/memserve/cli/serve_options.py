"""The options of ``memserve serve`` and what its help says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memserve.core import config
from memserve.core.config import DEFAULT_ACTIVATIONS, KV_CACHE_DTYPES, PHASES, POLICIES

_MODEL, _INSTANCES, _HTTP = "Model", "Instances", "HTTP"

HELP = """Serve a model over an OpenAI-compatible API.

Without options: SmolLM2-135M-Instruct, one prefill and one decode instance, at
http://127.0.0.1:8000. Ctrl-C stops everything.

Examples:

    memserve serve --port 9000 --kv-memory 2GiB
    memserve serve --prefill 2 --decode 2 --policy least-load
    memserve serve --colocated 1 --model ~/models/my-llama.gguf
"""

Model = Annotated[
    str | None,
    typer.Option(
        help="What to serve: **smollm2-135m** (default), a GGUF file, a folder with config.json and "
        "safetensors, or a hub id org/name.",
        rich_help_panel=_MODEL,
    ),
]
ServedName = Annotated[str | None, typer.Option(help="The name clients ask for.", rich_help_panel=_MODEL)]
Context = Annotated[
    int | None, typer.Option(help="Longest prompt and answer together, tokens.", rich_help_panel=_MODEL)
]
Runner = Annotated[
    str | None,
    typer.Option(
        help="**native**: C++ kernels (default). **reference**: numpy, slow and exact.",
        rich_help_panel=_MODEL,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="**stored**: 4 and 8 bits as in the file (default). **bf16**: expanded, the same answers from "
        "more memory. **int8**: 16-bit files in 8-bit groups too.",
        rich_help_panel=_MODEL,
    ),
]
WeightsCache = Annotated[
    str | None,
    typer.Option(
        help="Folder for weights in the form that kernels read, which makes later starts quick; **off**: "
        "none. Default: memserve in $XDG_CACHE_HOME or ~/.cache.",
        metavar="DIR",
        rich_help_panel=_MODEL,
    ),
]
Activations = Annotated[
    config.ActivationsOption | None,
    typer.Option(
        help="In what weights of 4 and 8 bits are multiplied. **bf16**: as exact as bf16 weights. **int8**: "
        f"integers, faster and less exact. **{DEFAULT_ACTIVATIONS.value}** (default): int8, but bf16 on CPUs "
        "with AMX.",
        rich_help_panel=_MODEL,
    ),
]
SpeculativeMethod = Annotated[
    str | None,
    typer.Option(
        help="**ngram**: several tokens per step where an answer repeats what was said; the same answers. "
        "Default **off**.",
        rich_help_panel=_MODEL,
    ),
]
NumSpeculativeTokens = Annotated[
    int | None,
    typer.Option(help="At most so many per step with ngram. Default 8.", rich_help_panel=_MODEL),
]
Prefill = Annotated[
    int | None, typer.Option(help="Instances that only read prompts. Default 1.", rich_help_panel=_INSTANCES)
]
Decode = Annotated[
    int | None, typer.Option(help="Instances that only write answers. Default 1.", rich_help_panel=_INSTANCES)
]
Colocated = Annotated[
    int | None,
    typer.Option(
        help="Instances that do both. Given alone, there are no others.", rich_help_panel=_INSTANCES
    ),
]
Phases = Annotated[
    str | None,
    typer.Option(
        help="What is kept and what is moved after prefill and decode: "
        f"{', '.join(PHASES)}. Default pd-caching-3: everything is kept, and answers flow back.",
        rich_help_panel=_INSTANCES,
    ),
]
Policy = Annotated[
    str | None,
    typer.Option(
        help=f"Who gets a request: {', '.join(POLICIES)}. Default cost: the least seconds for all.",
        rich_help_panel=_INSTANCES,
    ),
]
Trees = Annotated[
    config.TreeSource | None,
    typer.Option(
        help="How the router knows who holds which prefix: **events** of the pools (default), or **ttl**, "
        "its own decisions, forgotten after scheduler.ttl_seconds.",
        rich_help_panel=_INSTANCES,
    ),
]
DecisionLog = Annotated[
    str | None,
    typer.Option(
        help="A file for all that the router is told and decides, prompts included, for **memserve replay**. "
        "It is replaced, and ends at 1 GiB.",
        metavar="FILE",
        rich_help_panel=_INSTANCES,
    ),
]
KvMemory = Annotated[
    str | None,
    typer.Option(
        help="KV memory of each instance, for example 512MiB. Default 1GiB.",
        metavar="SIZE",
        rich_help_panel=_INSTANCES,
    ),
]
KvCacheDtype = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(KV_CACHE_DTYPES)}. **int8**: half the KV memory and transfer, answers change a "
        "little. Default auto: bf16. The same for all instances.",
        rich_help_panel=_INSTANCES,
    ),
]
HostMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory per instance for KV that no longer fits --kv-memory. Default 0: none.",
        metavar="SIZE",
        rich_help_panel=_INSTANCES,
    ),
]
Disk = Annotated[
    str | None,
    typer.Option(
        help="Folder for KV that fits no memory; a restart finds it again. Default: none.",
        metavar="PATH",
        rich_help_panel=_INSTANCES,
    ),
]
DiskMemory = Annotated[
    str | None,
    typer.Option(
        help="Room per instance in --disk. Default 4GiB where --disk is given.",
        metavar="SIZE",
        rich_help_panel=_INSTANCES,
    ),
]
RestartLost = Annotated[
    bool | None,
    typer.Option(
        "--restart-lost/--no-restart-lost",
        help="Start an instance again that has died. Default: yes, 5 times in a row at most.",
        rich_help_panel=_INSTANCES,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        help="Threads of each instance. Default: cores divided by instances.",
        rich_help_panel=_INSTANCES,
    ),
]
Pin = Annotated[
    bool | None,
    typer.Option(
        "--pin/--no-pin",
        help="Keep the threads of each instance on cores of their own where together they take all cores. "
        "Default: yes.",
        show_default=False,
        rich_help_panel=_INSTANCES,
    ),
]
TargetTpot = Annotated[
    float | None,
    typer.Option(
        help="Seconds between two tokens of a running answer, kept while prompts are read. Default 0.1; "
        "0: prompts first.",
        metavar="SECONDS",
        rich_help_panel=_INSTANCES,
    ),
]
Host = Annotated[
    str | None, typer.Option(help="Address to listen on. Default 127.0.0.1.", rich_help_panel=_HTTP)
]
Port = Annotated[
    int | None, typer.Option(help="Port. Default 8000; 0 takes a free one.", rich_help_panel=_HTTP)
]
RequestTimeout = Annotated[
    float | None,
    typer.Option(
        help="Longest time for one answer; what takes longer is cancelled. Default 600.",
        metavar="SECONDS",
        rich_help_panel=_HTTP,
    ),
]
SloTtft = Annotated[
    float | None,
    typer.Option(
        help="Refuse requests whose first token would come later. Default 0: none. Requests may say "
        "otherwise: x-memserve-slo-ttft.",
        metavar="SECONDS",
        rich_help_panel=_HTTP,
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar="MEMSERVE_API_KEY",
        help="Key that clients must send. Better given in the environment than on the command line.",
        rich_help_panel=_HTTP,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(help="TOML file with any of this and more (docs/api.md); options here win over it."),
]
