"""The C++ kernels. Addresses are of this process and are trusted; shapes and indices are checked."""

from collections.abc import Sequence
from typing import Any, ClassVar

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

packed_layout: int
"""Version of what packing makes of matrices; equal on all levels."""

def read_bandwidth(threads: int, nbytes: int = ..., isa: str | None = None) -> float:
    """Measured: bytes/s that ``threads`` threads read from memory beyond the caches."""

def dot_peak(threads: int, isa: str | None = None, activations: str = "bf16") -> float:
    """Measured: operations/s, two per multiply-add, of dot products fed from registers."""

class Matrix:
    """A matrix to be packed; borrows the caller's memory."""

    def __init__(self, values: NDArray[np.float32]) -> None:
        """values: float32[outputs, inputs]."""

    @staticmethod
    def of_blocks(kind: str, rows: NDArray[np.uint8], inputs: int) -> Matrix:
        """rows: uint8[outputs, bytes] in blocks of ggml's type ``kind``; ValueError if they are not."""

def multiply(
    matrix: Matrix,
    inputs: NDArray[np.uint16],
    isa: str | None = None,
    keep: str = "stored",
    activations: str = "bf16",
) -> NDArray[np.float32]:
    """One product, float32[rows, outputs], of bf16 bits[rows, inputs], as a model computes it; for tests."""

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
        cores: Sequence[int] = (),
        isa: str | None = None,
        keep: str = "stored",
        activations: str = "bf16",
        kv_dtype: str = "bf16",
    ) -> None:
        """cosines, sines: float32[positions, head_dim / 2]; cores: where each thread is to stay, or none.

        Raises ValueError for shapes it cannot run.
        """

    @property
    def isa(self) -> str: ...
    tile_rows: ClassVar[int]
    """Rows of a pass that go through all layers together, before the next ones do."""
    @property
    def weight_bytes(self) -> int:
        """Bytes of packed weights."""

    @property
    def multiplies_integers(self) -> bool:
        """Whether any matrix set so far is multiplied in integers."""

    def set_layer(
        self,
        index: int,
        q: Matrix,
        k: Matrix,
        v: Matrix,
        o: Matrix,
        gate: Matrix,
        up: Matrix,
        down: Matrix,
    ) -> None:
        """Pack one layer; matrices are [outputs, inputs]."""

    def set_norms(
        self, index: int, attention_norm: NDArray[np.float32], ffn_norm: NDArray[np.float32]
    ) -> None: ...
    def set_head_vectors(
        self,
        index: int,
        qkv_bias: NDArray[np.float32] | None = None,
        q_norm: NDArray[np.float32] | None = None,
        k_norm: NDArray[np.float32] | None = None,
    ) -> None: ...
    def set_embedding(self, embedding: Matrix) -> None:
        """embedding: [vocabulary, hidden]."""

    def set_head(self, head: Matrix | None) -> None:
        """head: [vocabulary, hidden]; None ties it to the embedding."""

    def set_output_norm(self, norm: NDArray[np.float32]) -> None: ...
    def packed(self) -> NDArray[np.uint8]:
        """All packed matrices, in place and read-only: uint8[weight_bytes]."""

    def placed(self) -> list[tuple[int, int, int, int]]:
        """Format, columns, depth and offset in ``packed()`` of each matrix."""

    def adopt(self, memory: NDArray[np.uint8], matrices: list[tuple[int, int, int, int]]) -> None:
        """Use matrices that an equal model packed before, in place. ValueError if they are another's."""

    def forward(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        starts: NDArray[np.int32],
        blocks: NDArray[np.uint64],
        logit_rows: NDArray[np.int32],
        progress: int = -1,
        every: int = 1,
    ) -> NDArray[np.float32]:
        """Run a ForwardBatch; return float32[wanted, vocabulary]. Releases the GIL.

        ``progress``: an eventfd to which layers are added when a tile of rows has passed them, ``every`` at a
        time and the rest with the tile's last one.
        """

# --- the pool's index: see native/blocks.h and native/prefixes.h ---
#
# Raises IndexError for a block number that is not there, ValueError for an array that is too short.

class BlockColumns:
    """The columns of the block table, in place: three with a value per block, the last with one per tier."""

    def __init__(
        self,
        addresses: NDArray[np.uint64],
        uses: NDArray[np.int32],
        origins: NDArray[np.uint8],
        historical: NDArray[np.int64],
    ) -> None: ...

def resolve_addresses(table: BlockColumns, asked: NDArray[np.uint64], numbers: NDArray[np.int64]) -> int:
    """How many of ``asked`` from the first on are present addresses; ``numbers`` gets their blocks."""

def occupy_blocks(table: BlockColumns, stacked: NDArray[np.int64], occupied: NDArray[np.uint64]) -> None:
    """Give free blocks one reference each, the last first; ``occupied`` gets their addresses."""

def retain_blocks(table: BlockColumns, numbers: NDArray[np.int64]) -> int:
    """Add one reference to each block. Returns how many were done before one that is free."""

def lease_edges(
    table: BlockColumns,
    edges: list[NDArray[np.int32]],
    leased: NDArray[np.uint64],
    origins: NDArray[np.uint8],
) -> int:
    """The same for the blocks of ``edges``; the last two get their addresses and origins."""

def release_addresses(
    table: BlockColumns, asked: NDArray[np.uint64], freed: NDArray[np.int64]
) -> tuple[int, int]:
    """Drop one reference per address. Returns how many blocks that freed, which ``freed`` gets, and how many
    addresses were stale."""

def enter_index(table: BlockColumns, numbers: NDArray[np.int64], origin: int) -> bool:
    """Mark blocks as indexed, and where they came from: all of them, or none and False if one may not be."""

def leave_index(table: BlockColumns, edges: list[NDArray[np.int32]], freed: NDArray[np.int64]) -> int:
    """Take blocks out of the index. Returns how many are free now, in ``freed``."""

def idle_tail(table: BlockColumns, edge: NDArray[np.int32], end: int, most: int) -> int:
    """How many of the ``most`` blocks of ``edge`` before ``end`` nobody holds, from the last back."""

def count_different(edges: list[NDArray[np.int32]], numbers: NDArray[np.int64]) -> int:
    """In how many places ``numbers`` differ from the blocks of ``edges``."""

def common_prefix(a: NDArray[np.int32], b: NDArray[np.int32], start: int = 0) -> int:
    """How many leading tokens of ``a`` agree with those of ``b`` from ``start`` on."""

def walk_edges(top: dict[bytes, Any], tokens: NDArray[np.int32], block: int) -> tuple[list[Any], int, int]:
    """The nodes on the way of ``tokens`` from the children ``top``, by their ``key`` and ``children``.

    With them how many blocks of the last one agree, and how many there are in all.
    """

def recall_prefix(
    table: NDArray[np.uint8], tokens: NDArray[np.int32], span: int, seed: int, follows: int, stamp: float
) -> list[tuple[int, int, int, float]]:
    """What ``table`` remembers of the chunks of a prompt, which it is told of; rows of alike chunks.

    A row: how many chunks, their uses, what they followed, when they were used last.
    """

def weigh_places(
    table: NDArray[np.float64],
    start: NDArray[np.intp],
    only_decodes: NDArray[np.bool_],
    hands_over: NDArray[np.bool_],
    decode: NDArray[np.intp],
    held: list[tuple[int, bytes]],
    lowered: list[tuple[int, bytes]],
    fetchable: list[tuple[int, bytes]],
    question: tuple[float, float, float, float, float, float],
    weights: tuple[float, float, float, float, float],
    starts: int,
    decodes: int,
) -> tuple[tuple[list[int], bytes], tuple[list[int], bytes], float, float, float, int]:
    """What a request would cost at each place: ``native/weigh.h``.

    ``table``: float64[columns, slots]; ``start`` with its two flags, and ``decode``: slots; ``held`` and
    ``fetchable``: tokens and the mask of the slots that will hold, or hold now, as many, little-endian, the
    longest first. ``question``: prompt and answer in tokens, now, and of the wire seconds and seconds per
    token; ``weights`` as in ``Weights``. Returns the cheapest places to start and to decode, at most so many
    and at least one of each: their numbers, and packed as ``<ddq`` what ``Figures`` are; at the cheapest the
    seconds to wait, to prefill and, weighted, to decode; the slot that sends what is fetched, or -1.
    ValueError if shapes do not fit or a slot is not in the table.
    """
