"""The C++ kernels. Addresses are of this process and are trusted; shapes and indices are checked."""

import numpy as np
from numpy.typing import NDArray

def isa() -> str:
    """The instruction-set level in use for copies, and for models that name none."""

def supported_isas() -> list[str]:
    """Levels this machine runs, best first; ``portable`` is always the last."""

def emulated_isas() -> list[str]:
    """Levels for tests only: plain C++ in place of instructions that this machine may lack."""

def set_isa(name: str) -> None:
    """Change the level. Raises ValueError if it does not run here."""

def copy_blocks(dst: NDArray[np.uint64], src: NDArray[np.uint64], nbytes: int) -> NDArray[np.uint64]:
    """Copy ``nbytes`` bytes from each address in ``src`` to the one in ``dst``; return uint64[n] checksums.

    Releases the GIL. The checksum is defined in ``native/copy.h`` and equal on all levels.
    """

def checksum_blocks(src: NDArray[np.uint64], nbytes: int) -> NDArray[np.uint64]:
    """The checksums that ``copy_blocks`` would return. Releases the GIL."""

def read_bandwidth(threads: int, nbytes: int = ..., isa: str | None = None) -> float:
    """Measured: bytes/s that ``threads`` threads read from memory beyond the caches."""

def dot_peak(threads: int, isa: str | None = None) -> float:
    """Measured: FLOP/s of bf16 dot products fed from registers."""

class Matrix:
    """A matrix to be packed; borrows the caller's memory."""

    def __init__(self, values: NDArray[np.float32]) -> None:
        """values: float32[outputs, inputs]."""

    @staticmethod
    def of_blocks(kind: str, rows: NDArray[np.uint8], inputs: int) -> Matrix:
        """rows: uint8[outputs, bytes] in blocks of ggml's type ``kind``; ValueError if they are not."""

class Model:
    """A Llama-family decoder; see ``native/model.h``. One pass at a time."""

    def __init__(
        self,
        *,
        layers: int,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        feed_forward: int,
        vocabulary: int,
        rms_epsilon: float,
        cosines: NDArray[np.float32],
        sines: NDArray[np.float32],
        threads: int,
        pin: bool = False,
        isa: str | None = None,
        keep: str = "stored",
    ) -> None:
        """cosines, sines: float32[positions, head_dim / 2]. Raises ValueError for shapes it cannot run."""

    @property
    def isa(self) -> str: ...
    @property
    def weight_bytes(self) -> int:
        """Bytes of packed weights."""

    def set_layer(
        self,
        index: int,
        attention_norm: NDArray[np.float32],
        q: Matrix,
        k: Matrix,
        v: Matrix,
        o: Matrix,
        ffn_norm: NDArray[np.float32],
        gate: Matrix,
        up: Matrix,
        down: Matrix,
    ) -> None:
        """Pack one layer; matrices are [outputs, inputs]."""

    def set_embedding(self, embedding: Matrix) -> None:
        """embedding: [vocabulary, hidden]."""

    def set_output(self, norm: NDArray[np.float32], head: Matrix | None) -> None:
        """head: [vocabulary, hidden]; None ties it to the embedding."""

    def forward(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        starts: NDArray[np.int32],
        blocks: NDArray[np.uint64],
        logit_rows: NDArray[np.int32],
    ) -> NDArray[np.float32]:
        """Run a ForwardBatch; return float32[wanted, vocabulary]. Releases the GIL."""
