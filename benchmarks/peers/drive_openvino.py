"""OpenVINO GenAI's continuous-batching pipeline behind the protocol, from a GGUF file.

Options: ``kv`` (u8, f16, bf16, f32), ``precision`` (bf16, f32), ``group`` (values that share a scale when the
inputs of matrix products are put into 8 bits; 0: they are not), ``step_tokens``, ``split_fuse`` (0, 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import openvino
import openvino_genai as genai

from peers.protocol import Load
from peers.serving import Opened, serve

_DEFAULT_GROUP = {"4bit": "32", "bf16": "0"}


class OpenVINOEngine:
    """A ``StepEngine``."""

    def __init__(self, load: Load) -> None:
        options = load.options
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = int(options.get("step_tokens", "512"))
        scheduler.dynamic_split_fuse = options.get("split_fuse", "1") == "1"
        scheduler.max_num_seqs = 64
        scheduler.cache_size = 0  # as much as the running sequences need
        self.properties = {
            "INFERENCE_NUM_THREADS": load.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": options.get("precision", "bf16"),
            "KV_CACHE_PRECISION": options.get("kv", "u8"),
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": options.get("group", _DEFAULT_GROUP[load.weights]),
        }
        self._pipeline = genai.ContinuousBatchingPipeline(load.model, scheduler, "CPU", self.properties)
        self._asked = 0
        self._running: dict[int, genai.GenerationHandle] = {}

    def prepare(self, streams: int, longest: int) -> None:
        """Nothing: the cache grows as needed."""

    def add(self, prompt: Sequence[int], max_tokens: int) -> int:
        self._asked += 1
        config = genai.GenerationConfig(max_new_tokens=max_tokens, do_sample=False, ignore_eos=True)
        tokens = openvino.Tensor(np.array([prompt], np.int64))
        self._running[self._asked] = self._pipeline.add_request(self._asked, tokens, config)
        return self._asked

    def step(self) -> Iterable[int]:
        self._pipeline.step()
        got = []
        for number, handle in list(self._running.items()):
            while handle.can_read():
                got += [number] * sum(len(output.generated_ids) for output in handle.read().values())
            if handle.get_status() != genai.GenerationStatus.RUNNING:
                del self._running[number]
        return got

    def cancel(self, requests: Sequence[int]) -> None:
        for request in requests:
            if handle := self._running.pop(request, None):
                handle.cancel()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()

    def close(self) -> None:
        del self._pipeline


def open_engine(load: Load) -> Opened:
    engine = OpenVINOEngine(load)
    group = engine.properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"]
    inputs = str(engine.properties["INFERENCE_PRECISION_HINT"])
    about: dict[str, str] = {
        "version": f"openvino-genai {genai.__version__}",
        "weights": "4 and 8 bits as its GGUF reader converts them" if load.weights == "4bit" else "bf16",
        "inputs of matrix products": inputs if group == "0" else f"8 bits per value in groups of {group}",
        "KV cache": str(engine.properties["KV_CACHE_PRECISION"]),
        "step": f"{load.options.get('step_tokens', '512')} tokens",
        "properties": str(engine.properties),
    }
    return Opened(engine, about, engine.close)


if __name__ == "__main__":
    serve(open_engine)
