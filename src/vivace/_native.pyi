"""The native core: runs a bound block list, draws tokens. Errors are `vivace.errors.NativeError`.

Arrays are C-contiguous numpy arrays.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vivace.blocks import AttentionBlock, ExpertsBlock, HeadSpec, LinearBlock, MlpBlock

_Floats = NDArray[np.float32]
_Int32 = NDArray[np.int32]
_Int64 = NDArray[np.int64]
_BoundNorm = tuple[np.ndarray, np.ndarray | None]  # a weight and its bias

class _Packed(Protocol):
    """As `vivace.techniques.weight_formats.base.Packed`."""

    @property
    def kernel(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def raw(self) -> NDArray[np.uint8]: ...

_Bound = tuple[_Packed, np.ndarray | None]  # a matrix and its bias
_BoundExpert = tuple[Sequence[_Bound], Sequence[_Bound]]  # gate_up and down

class Program:
    """The block list bound to buffers. Keeps the arrays that it was given alive.

    Build order: ropes, groups, embedding, blocks in execution order, head.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        kv_kernel: str,
        threads: int | None,
        isa: str | None,
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def num_threads(self) -> int: ...
    def is_finite(self, packed: _Packed) -> bool:
        """Whether a packed matrix holds neither NaN nor infinity."""

    def set_rope(self, index: int, cos: _Floats, sin: _Floats, is_interleaved: bool) -> None:
        """Tables [num_positions, rotary_dim/2]; may be replaced by longer ones."""

    def add_group(self, num_layers: int, num_kv_heads: int, head_dim: int) -> None: ...
    def set_embedding(self, weight: _Packed, scale: float, positions: _Packed | None) -> None: ...
    def set_head(
        self, spec: HeadSpec, linear: Sequence[_Bound], norm: _BoundNorm | None
    ) -> None: ...
    def add_attention(
        self,
        spec: AttentionBlock,
        qkv: Sequence[_Bound],
        out: Sequence[_Bound],
        norm: _BoundNorm | None,
        post_norm: _BoundNorm | None,
        q_norm: _BoundNorm | None,
        k_norm: _BoundNorm | None,
        sinks: _Floats | None,
    ) -> None: ...
    def add_mlp(
        self,
        spec: MlpBlock,
        gate_up: Sequence[_Bound],
        down: Sequence[_Bound],
        norm: _BoundNorm | None,
        post_norm: _BoundNorm | None,
    ) -> None: ...
    def add_linear(
        self,
        spec: LinearBlock,
        linear: Sequence[_Bound],
        norm: _BoundNorm | None,
        post_norm: _BoundNorm | None,
    ) -> None: ...
    def add_experts(
        self,
        spec: ExpertsBlock,
        router: Sequence[_Bound],
        shared_gate: Sequence[_Bound] | None,
        experts: list[_BoundExpert],
        shared: _BoundExpert | None,
        norm: _BoundNorm | None,
        post_norm: _BoundNorm | None,
    ) -> None: ...
    def set_site(self, block_index: int, site: Callable[[_Floats], None] | None) -> None: ...
    def allocate(self, num_blocks: Sequence[int], block_size: int) -> None:
        """(Re)allocate the cache, one count per layer group. Pages are taken when written."""

    def copy_blocks(self, group: int, sources: _Int32, targets: _Int32) -> None: ...
    def read_blocks(self, group: int, block_ids: _Int32) -> NDArray[np.uint8]: ...
    def write_blocks(self, group: int, block_ids: _Int32, raw: NDArray[np.uint8]) -> None: ...
    def fill_cache(self, byte: int) -> None: ...
    def run(
        self,
        tokens: _Int32,
        positions: _Int32,
        embeddings: tuple[_Int32, _Floats] | None,
        groups: list[tuple[np.ndarray, ...]],
        logits_rows: _Int32,
        logits: _Floats,
        hidden: list[tuple[int, _Int32, _Floats]],
        top: tuple[_Int32, _Floats] | None,
        sums: _Floats | None,
        first_block: int,
        last_block: int,
        cancel: _Int32,
    ) -> bool:
        """One step; fills `logits`, `hidden`, `top` and `sums`. Returns True if cancelled.

        Raises:
            NativeError: the step does not fit (nothing was written), or keys, values or router
                logits are not finite. The program can be used on.
        """

_LogProbs = tuple[_Floats, _Int32, _Floats]  # of the token [R]; top ids and values [R, n]

def sample(
    logits: _Floats,
    options: NDArray[np.float64],
    keys: NDArray[np.uint64],
    history: tuple[_Int64, _Int64, _Int32] | None = None,
    bias: tuple[_Int64, _Int32, _Floats] | None = None,
    forbidden: tuple[_Int64, _Int32] | None = None,
    num_logprobs: int | None = None,
    threads: int = 1,
) -> tuple[_Int32, _LogProbs | None]:
    """Draw a token per row of `logits` [R, V].

    Args:
        options: [R, 8]: repetition_penalty, presence_penalty, frequency_penalty, temperature,
            typical_p, top_p, min_p, top_k (0: off), as in `SamplingParams`.
        keys: [R, 4]: seed, stream, position, purpose of each row's `RandomKey`.
        history: (offsets [R + 1], prompt lengths [R], ids): tokens so far of the rows with
            penalties, the prompt's first; a row without has an empty range. Repetition counts all,
            presence and frequency only those after the prompt.
        bias: (offsets [R + 1], ids, values), added after the penalties.
        forbidden: (offsets [R + 1], ids): never drawn.
        num_logprobs: also return log-probabilities under the raw logits, of the drawn tokens and of
            so many of the largest logits; None: none.
        threads: rows run in parallel on the pool that executors with so many threads share.
    Raises:
        NativeError: logits are NaN or infinite, or every token of a row is forbidden.
    """

def log_probs(
    logits: _Floats, targets: _Int32, num_logprobs: int = 0, threads: int = 1
) -> _LogProbs:
    """Log-probabilities of `targets` [R], and of the `num_logprobs` largest logits per row."""

# ------------------------------------------------------------ loading

def decode_blocks(
    format: str,
    raw: NDArray[np.uint8],
    out: np.ndarray,
    threads: int | None = None,
    isa: str | None = None,
) -> None:
    """Decode rows of quantized blocks as GGUF stores them, `format` by its name there.

    Args:
        raw: [rows, bytes of a row].
        out: [rows, weights of a row], float32, float16, or the bits of bfloat16 (uint16); rounded
            to nearest even, denormals kept.
        threads: of the pool that executors with so many threads share; None: all.
        isa: instruction set; None: the best one. All give the same bits.
    Raises:
        NativeError: an unknown format, or shapes that do not fit together.
    """

def matrix_bytes(kernel: str, num_rows: int, num_columns: int) -> int:
    """Bytes of a matrix stored for a kernel. Raises NativeError: no such kernel or shape."""

def pack_codes(
    kernel: str,
    weights: np.ndarray,
    out: NDArray[np.uint8],
    threads: int | None = None,
    isa: str | None = None,
) -> bool:
    """Round weights [rows, columns] to panels of integer codes.

    Args:
        kernel: such as "int4/32/float16/zeros".
        weights: float32, float16, or the bits of bfloat16 (uint16).
        out: `matrix_bytes` of them.
        threads: of the pool that executors with so many threads share; None: all.
        isa: instruction set; None: the best one. All give the same bits.
    Returns:
        False if finite weights have a scale that is not finite as stored. Where weights are NaN or
        infinite, so is their scale.
    Raises:
        NativeError: an unknown kernel, or shapes that do not fit together.
    """

def is_finite(packed: _Packed, threads: int | None = None) -> bool:
    """Whether a packed matrix holds neither NaN nor infinity."""

def checksum(data: NDArray[np.uint8], threads: int | None = None) -> int:
    """64 bits that tell damaged bytes, of a flat array; no protection against an attacker."""

# ------------------------------------------------------------ single kernels, for tests

class Attention:
    """One layer's cache of keys and values, and attention over it."""

    def __init__(
        self,
        kv_kernel: str,
        num_kv_heads: int,
        head_dim: int,
        num_blocks: int,
        block_size: int,
        isa: str | None = None,
        threads: int = 1,
    ) -> None: ...
    def fill(self, byte: int) -> None: ...
    def write(self, slots: _Int64, keys: _Floats, values: _Floats) -> None:
        """Keys and values [n, num_kv_heads, head_dim]."""

    def __call__(
        self,
        queries: _Floats,
        positions: _Int32,
        group: tuple[np.ndarray, ...],
        scale: float,
        soft_cap: float = 0.0,
        sinks: _Floats | None = None,
        wants_sums: bool = False,
    ) -> tuple[_Floats, _Floats, _Floats]:
        """Attend with queries [n, num_heads, head_dim]; `group` is what `flatten` gives.

        Returns out, like the queries; its log-sum-exp [n, num_heads]; and if wanted the weights
        summed over each span's rows, [num_heads, entries] after one another.
        """

def norm(
    x: _Floats,
    kind: str,
    weight: _Floats,
    bias: _Floats | None,
    eps: float,
    isa: str | None = None,
) -> _Floats: ...
def activate(
    activation: str, gate: _Floats, up: _Floats | None = None, isa: str | None = None
) -> _Floats: ...
def rotate(
    heads: _Floats, cos: _Floats, sin: _Floats, is_interleaved: bool, isa: str | None = None
) -> _Floats: ...
def soft_cap(x: _Floats, cap: float, scale: float, isa: str | None = None) -> _Floats: ...
def softmax_parts(
    x: _Floats, scale: float, isa: str | None = None
) -> tuple[_Floats, _Floats, float]:
    """exp((x - max) * scale), its sums by 64 elements, and max."""

# ------------------------------------------------------------ the machine and its kernels

class Linear:
    """One linear group on its own, for tests and benchmarks."""

    def __init__(self, parts: list[_Bound], isa: str = "", threads: int = 1) -> None: ...
    def __call__(self, x: _Floats) -> _Floats:
        """x [M, in_features] -> [M, out_features]."""

    def row(self, index: int) -> _Floats:
        """A row of the first matrix: [1, in_features]."""

def time_linears(linears: Sequence[Linear], num_rows: int, repeats: int) -> list[float]:
    """Seconds of each of `repeats` rounds through all of `linears`."""

def isa_names() -> list[str]:
    """Instruction sets that this machine can run, the best last."""

def selected_isa() -> str:
    """The instruction set that runs: the best, or what VIVACE_ISA says."""

def default_threads() -> int:
    """Processors that this process may use: its affinity mask, cut by its cgroup's quota."""

def read_bandwidth(seconds: float = 1.0, threads: int = 0) -> float:
    """Bytes per second of the best of several read loops over 256 MiB."""

def peak_flops(kind: str, seconds: float = 0.5, threads: int = 0) -> float:
    """Operations per second of a register-only loop: kind float32 or bfloat16."""

def pool_counts(threads: int, items: int, jobs: int) -> list[int]:
    """How often each item of a pool's jobs ran: [items], for tests."""
