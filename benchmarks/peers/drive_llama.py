"""llama.cpp behind the protocol, through llama-cpp-python's C interface.

The binding has no continuous batching of its own; steps are put together as ``llama-server`` does: one row
for each running stream, then prompts in order of arrival up to ``n_batch`` rows.

Options: ``n_batch``, ``n_ubatch``, ``flash_attn`` (auto, on, off), ``kv`` (f16, q8_0, bf16).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import llama_cpp
import numpy as np

from peers.protocol import Load
from peers.serving import Opened, Refused, serve
from peers.stepping import EngineError

_FLASH = {"auto": -1, "off": 0, "on": 1}
_KV_TYPES = {"f16": 1, "q8_0": 8, "bf16": 30}


@dataclass(slots=True)
class Sequenced:
    """A request: what is still to be computed, where it is, how many tokens it may get."""

    number: int
    slot: int
    pending: list[int]
    left: int
    at: int = 0
    rows: list[int] = field(default_factory=list)


class LlamaEngine:
    """A ``StepEngine``."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._batch_rows = int(load.options.get("n_batch", "512"))
        llama_cpp.llama_backend_init()
        # The model asks the kernel to read its file ahead; weights are repacked at load where that is faster.
        parameters = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(load.model.encode(), parameters)
        if not self._model:
            raise Refused(f"llama.cpp cannot load {load.model}")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._batch = llama_cpp.llama_batch_init(self._batch_rows, 0, 1)
        self._context: object = None
        self._shape = (0, 0)
        self._asked = 0
        self._free: list[int] = []
        self._running: list[Sequenced] = []
        self.prepare(1, 1024)

    def prepare(self, streams: int, longest: int) -> None:
        """One KV buffer per stream, as long as asked for: the quicker of the library's two ways."""
        longest = -(-longest // 256) * 256
        if self._shape == (streams, longest):
            return
        self._close_context()
        options, parameters = self._load.options, llama_cpp.llama_context_default_params()
        parameters.n_ctx = streams * longest
        parameters.n_seq_max = streams
        parameters.n_batch = self._batch_rows
        parameters.n_ubatch = int(options.get("n_ubatch", str(self._batch_rows)))
        parameters.n_threads = parameters.n_threads_batch = self._load.threads
        parameters.flash_attn_type = _FLASH[options.get("flash_attn", "auto")]
        parameters.type_k = parameters.type_v = _KV_TYPES[options.get("kv", "f16")]
        parameters.kv_unified = False
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise EngineError(f"llama.cpp made no context for {streams} sequences of {longest} tokens")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._shape = (streams, longest)
        self._free = list(range(streams))

    def add(self, prompt: Sequence[int], max_tokens: int) -> int:
        if not self._free:
            raise EngineError("more sequences than prepared for")
        self._asked += 1
        self._running.append(Sequenced(self._asked, self._free.pop(0), list(prompt), max_tokens))
        return self._asked

    def step(self) -> Iterable[int]:
        wanted = self._fill_batch()
        status = llama_cpp.llama_decode(self._context, self._batch)
        if status:
            raise EngineError(f"llama_decode returned {status}")
        got = []
        for row, sequence in wanted:
            token = self._most_likely(row)
            sequence.pending = [token]
            sequence.left -= 1
            got.append(sequence.number)
            if not sequence.left:
                self._end(sequence)
        return got

    def _fill_batch(self) -> list[tuple[int, Sequenced]]:
        """Lay out the next pass; the rows whose logits are wanted, and whose they are."""
        batch, rows, wanted = self._batch, 0, []
        for sequence in sorted(self._running, key=lambda each: len(each.pending) > 1):
            count = min(len(sequence.pending), self._batch_rows - rows)
            for token in sequence.pending[:count]:
                batch.token[rows] = token
                batch.pos[rows] = sequence.at
                batch.n_seq_id[rows] = 1
                batch.seq_id[rows][0] = sequence.slot
                batch.logits[rows] = 0
                sequence.at += 1
                rows += 1
            del sequence.pending[:count]
            if count and not sequence.pending:
                batch.logits[rows - 1] = 1
                wanted.append((rows - 1, sequence))
        batch.n_tokens = rows
        return wanted

    def _most_likely(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())

    def cancel(self, requests: Sequence[int]) -> None:
        for sequence in [each for each in self._running if each.number in requests]:
            self._end(sequence)

    def _end(self, sequence: Sequenced) -> None:
        self._running.remove(sequence)
        llama_cpp.llama_memory_seq_rm(self._memory, sequence.slot, -1, -1)
        self._free.append(sequence.slot)

    def keep(self, listener: object) -> None:
        """Hold on to what the library calls, which it does not itself."""
        self._listener = listener

    def _close_context(self) -> None:
        if self._context is not None:
            llama_cpp.llama_free(self._context)
            self._context, self._shape = None, (0, 0)
        self._running.clear()

    def close(self) -> None:
        self._close_context()
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_model_free(self._model)


def _log_warnings(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    if level >= 3:
        print(text.decode(errors="replace"), end="", flush=True)


def open_engine(load: Load) -> Opened:
    listener = llama_cpp.llama_log_callback(_log_warnings)
    llama_cpp.llama_log_set(listener, ctypes.c_void_p(0))
    engine = LlamaEngine(load)
    engine.keep(listener)
    system = llama_cpp.llama_print_system_info().decode()
    about = {
        "version": f"llama-cpp-python {llama_cpp.__version__}",
        "build": system.replace(" = 1", "").replace(" |", ","),
        "weights": "as in the file, repacked for the instruction set where llama.cpp can",
        "inputs of matrix products": "8 bits per value in groups of 32 (4-bit weights); bf16 (bf16 weights)",
        "KV cache": load.options.get("kv", "f16"),
        "step": f"{load.options.get('n_batch', '512')} tokens",
        "flash attention": load.options.get("flash_attn", "auto"),
    }
    return Opened(engine, about, engine.close)


if __name__ == "__main__":
    serve(open_engine)
