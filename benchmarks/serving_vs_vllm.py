"""MemServe beside vLLM's CPU server with prefix caching: same model, workload, client and machine, in turns.

    python benchmarks/serving_vs_vllm.py --data DIR [--workloads sharegpt,loogle,react] [--sessions 12]
                                         [--concurrency 4] [--rounds 2] [--out FILE]

Three servers of SmolLM2-135M on two threads each, all up, one asked at a time: ours disaggregated and caching
(1 prefill, 1 decode) with the weights as published (4 bits), the same with those weights rounded to bf16, and
vLLM with the bf16 ones, because it cannot read the published file. Sessions in a closed loop; later prompts
contain the recorded answers and all answers have the recorded length, so that all three get the same work.
1 GiB of KV each. vLLM is installed as ``engine_vs_peers.py`` does it, with the settings described there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path

import httpx

from bench_command import Row, row_of, run_bench, table_of
from memserve.bench.target import Target, open_target
from memserve.engine.models.gguf_file import GGUFFile
from memserve.engine.models.loader import open_path
from memserve.engine.models.resolve import DEFAULT_MODEL
from peers.engines import environment_for, parse_engine, recipe_for
from peers.install import install
from peers.model_files import prepare_model
from recording import RESULTS, write_result

CACHE = Path(__file__).resolve().parent.parent / "build" / "peers"
CONTEXT = 2048
THREADS = 2
OURS = {
    "memserve": ("--kv-memory", "512MiB"),
    "memserve-bf16": ("--kv-memory", "512MiB", "--weights", "bf16"),
}
VLLM = "vllm"
VLLM_KV_BYTES = 1 << 30
START_SECONDS = 600.0
STOP_SECONDS = 30.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with the data sets")
    parser.add_argument("--workloads", default="sharegpt,loogle,react")
    parser.add_argument("--sessions", type=int, default=12)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/serving_vs_vllm.json")
    asyncio.run(compare(parser.parse_args()))


async def compare(options: argparse.Namespace) -> None:
    rows: list[Row] = []
    async with AsyncExitStack() as stack:
        urls = {
            name: await stack.enter_async_context(open_target(Target(name, None, own), asyncio.Event()))
            for name, own in OURS.items()
        }
        urls[VLLM] = await stack.enter_async_context(serving_vllm(RESULTS.parent))
        shown = ",".join(f"{name}={url}" for name, url in urls.items())
        for workload in options.workloads.split(","):
            report = await asyncio.to_thread(
                run_bench,
                *("--url", shown, "--workload", workload, "--data", str(options.data)),
                *("--sessions", str(options.sessions), "--concurrency", str(options.concurrency)),
                *("--rounds", str(options.rounds), "--context", str(CONTEXT)),
                *("--recorded-answers", "--fixed-length", "--think", "0"),
            )
            rows += [row_of(workload, entry) for entry in report["entries"]]
            print(table_of(rows[-len(urls) :]), flush=True)
            figures = {name: getattr(options, name) for name in ("sessions", "concurrency", "rounds")}
            write_result("serving_vs_vllm", {**figures, "rows": [asdict(row) for row in rows]}, options.out)


@asynccontextmanager
async def serving_vllm(folder: Path) -> AsyncIterator[str]:
    """vLLM's server, ready, and its address."""
    engine = parse_engine(VLLM)
    recipe = recipe_for(engine)
    assert recipe is not None
    python = install(recipe, CACHE)
    log = CACHE / "logs" / "vllm-serving.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    port = free_port()
    environment = environment_for(engine, python, THREADS) | {
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    command = [
        *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(prepare_folder())),
        *("--served-model-name", DEFAULT_MODEL, "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "bfloat16", "--enable-prefix-caching", "--max-model-len", str(CONTEXT + 64)),
        *("--kv-cache-memory-bytes", str(VLLM_KV_BYTES), "--max-num-batched-tokens", "512"),
        *("--block-size", "128", "--max-num-seqs", "64", "--enable-prompt-tokens-details"),
    ]
    with log.open("w") as out:
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, cwd=folder, stdout=out, stderr=out, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        await until_ready(process, url, log)
        yield url
    finally:
        await end(process)


async def end(process: asyncio.subprocess.Process) -> None:
    """Stop a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


async def until_ready(process: asyncio.subprocess.Process, url: str, log: Path) -> None:
    async with asyncio.timeout(START_SECONDS), httpx.AsyncClient(trust_env=False) as http:
        while True:
            if process.returncode is not None:
                raise SystemExit(f"vLLM ended with {process.returncode}; see {log}")
            try:
                if (await http.get(f"{url}/health")).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                await asyncio.sleep(0.5)


def prepare_folder() -> Path:
    """The model's folder for vLLM with tokenizer and chat template, which ours reads from the GGUF file."""
    files = prepare_model(DEFAULT_MODEL, CACHE / "models")
    folder = files.safetensors.parent / "served"
    if folder.exists():
        return folder
    tokenizer = open_path(files.gguf).tokenizer()
    made = Path(f"{folder}.part")
    shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(files.safetensors, made)
    (made / "tokenizer.json").write_text(tokenizer.to_json())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": GGUFFile(files.gguf).metadata["tokenizer.chat_template"],
        "eos_token": tokenizer.token_text(tokenizer.eos_tokens[0]),
        "model_max_length": CONTEXT,
    }
    (made / "tokenizer_config.json").write_text(json.dumps(settings))
    made.rename(folder)
    return folder


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


if __name__ == "__main__":
    main()
