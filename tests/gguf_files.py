"""GGUF files made in code: raw ones of which any byte can be wrong, and a small whole model."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from tokenizers.pre_tokenizers import ByteLevel

__all__ = ["Metadata", "RawGguf", "RawTensor", "Tensors", "good_metadata", "good_tensors"]

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = (
    range(13)
)
CODES = {
    UINT8: "B",
    INT8: "b",
    UINT16: "H",
    INT16: "h",
    UINT32: "I",
    INT32: "i",
    FLOAT32: "f",
    BOOL: "?",
    UINT64: "Q",
    INT64: "q",
    FLOAT64: "d",
}


def pack(code: str, *values: Any) -> bytes:
    return struct.pack("<" + code, *values)


def string(text: str | bytes, length: int | None = None) -> bytes:
    """Length and bytes; `length` says something else than what follows."""
    data = text.encode() if isinstance(text, str) else text
    return pack("Q", len(data) if length is None else length) + data


def key(name: str | bytes, type: int, value: bytes) -> bytes:
    """A metadata key with the bytes of its value."""
    return string(name) + pack("I", type) + value


def array(name: str, type: int, elements: bytes, count: int) -> bytes:
    return key(name, ARRAY, pack("IQ", type, count) + elements)


@dataclass
class RawTensor:
    """A description and its data. `dims` are in the order of the file: the row's size first."""

    name: bytes
    dims: Sequence[int]
    type: int
    data: bytes
    offset: int | None = None  # None: where it lies
    num_dims: int | None = None  # None: as many as there are

    def description(self, offset: int) -> bytes:
        num_dims = len(self.dims) if self.num_dims is None else self.num_dims
        dims = b"".join(pack("q" if size < 0 else "Q", size) for size in self.dims)
        offset = offset if self.offset is None else self.offset
        return string(self.name) + pack("I", num_dims) + dims + pack("IQ", self.type, offset)


@dataclass
class RawGguf:
    """The parts of a file; what is None is said as it is."""

    magic: bytes = b"GGUF"
    version: int = 3
    keys: list[bytes] = field(default_factory=list)
    tensors: list[RawTensor] = field(default_factory=list)
    num_keys: int | None = None
    num_tensors: int | None = None
    alignment: int = 32  # by which data is laid out, whatever the metadata say

    def header(self) -> bytes:
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_keys = len(self.keys) if self.num_keys is None else self.num_keys
        parts = [self.magic, pack("IQQ", self.version, num_tensors, num_keys), *self.keys]
        offset = 0
        for tensor in self.tensors:
            parts.append(tensor.description(offset))
            offset += len(self._padded(tensor.data))
        return b"".join(parts)

    def _padded(self, data: bytes) -> bytes:
        return data + bytes(-len(data) % self.alignment)

    def bytes(self) -> bytes:
        data = b"".join(self._padded(tensor.data) for tensor in self.tensors)
        return self._padded(self.header()) + data


def good_raw() -> RawGguf:
    """A small file with a value of every kind and tensors of three types."""
    return RawGguf(
        keys=[
            key("general.architecture", STRING, string("llama")),
            *(key(f"a.{code}", type, pack(code, 1)) for type, code in CODES.items()),
            array("a.numbers", INT32, pack("3i", 1, 2, 3), 3),
            array("a.flags", BOOL, b"\0\1", 2),
            array("a.words", STRING, string("one") + string("zwölf"), 2),
        ],
        tensors=[
            RawTensor(b"floats", (3, 2), 0, np.arange(6, dtype=np.float32).tobytes()),
            RawTensor(b"blocks", (64, 2), 2, bytes(4 * 18)),
            RawTensor(b"halves", (5,), 1, np.arange(5, dtype=np.float16).tobytes()),
        ],
    )


# ---------------------------------------------------------------- a model

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
MERGES = ["Ġ t", "h e", "Ġt he"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
)
# name -> value, its type, and the type of an array's elements
Metadata = dict[str, tuple[Any, GGUFValueType, GGUFValueType | None]]
# name -> bytes of rows, their type
Tensors = dict[str, tuple[np.ndarray, GGMLQuantizationType]]


def good_metadata() -> Metadata:
    """Of a Llama with a byte-level vocabulary; names as in `gguf.constants.Keys`."""
    letters = sorted(ByteLevel.alphabet())
    merged = [merge.replace(" ", "") for merge in MERGES]
    control = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"]
    tokens = letters + merged + control
    kinds = [gguf.TokenType.NORMAL] * len(letters + merged) + [gguf.TokenType.CONTROL] * 4
    uint32, float32, text = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING
    return {
        "general.architecture": ("llama", text, None),
        "general.name": ("small", text, None),
        "llama.vocab_size": (len(tokens), uint32, None),
        "llama.context_length": (64, uint32, None),
        "llama.embedding_length": (HIDDEN, uint32, None),
        "llama.block_count": (LAYERS, uint32, None),
        "llama.feed_forward_length": (INNER, uint32, None),
        "llama.attention.head_count": (HEADS, uint32, None),
        "llama.attention.head_count_kv": (KV_HEADS, uint32, None),
        "llama.attention.layer_norm_rms_epsilon": (1e-5, float32, None),
        "llama.rope.dimension_count": (HIDDEN // HEADS, uint32, None),
        "llama.rope.freq_base": (10000.0, float32, None),
        "tokenizer.ggml.model": ("gpt2", text, None),
        "tokenizer.ggml.pre": ("default", text, None),
        "tokenizer.ggml.tokens": (tokens, GGUFValueType.ARRAY, text),
        "tokenizer.ggml.token_type": (
            [int(kind) for kind in kinds],
            GGUFValueType.ARRAY,
            GGUFValueType.INT32,
        ),
        "tokenizer.ggml.merges": (MERGES, GGUFValueType.ARRAY, text),
        "tokenizer.ggml.bos_token_id": (tokens.index("<|begin|>"), uint32, None),
        "tokenizer.ggml.eos_token_id": (tokens.index("<|end|>"), uint32, None),
        "tokenizer.chat_template": (CHAT_TEMPLATE, text, None),
    }


def good_tensors() -> Tensors:
    """Matrices in four types, norms as float32; the head is tied to the embedding."""
    random = np.random.default_rng(0)
    q8_0, q4_0 = GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0
    f16, f32 = GGMLQuantizationType.F16, GGMLQuantizationType.F32
    num_tokens = len(good_metadata()["tokenizer.ggml.tokens"][0])
    kv = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[tuple[int, ...], GGMLQuantizationType]] = {
        "token_embd.weight": ((num_tokens, HIDDEN), q8_0)
    }
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.{name}.weight": value
            for name, value in {
                "attn_norm": ((HIDDEN,), f32),
                "attn_q": ((HIDDEN, HIDDEN), q4_0),
                "attn_k": ((kv, HIDDEN), q4_0),
                "attn_v": ((kv, HIDDEN), q8_0),
                "attn_output": ((HIDDEN, HIDDEN), f16),
                "ffn_norm": ((HIDDEN,), f32),
                "ffn_gate": ((INNER, HIDDEN), f32),
                "ffn_up": ((INNER, HIDDEN), q8_0),
                "ffn_down": ((HIDDEN, INNER), q4_0),
            }.items()
        }
    shapes["output_norm.weight"] = ((HIDDEN,), f32)
    return {
        name: (gguf.quants.quantize(random.normal(size=shape).astype(np.float32) * 0.1, type), type)
        for name, (shape, type) in shapes.items()
    }


def write_model(path: Path, metadata: Metadata, tensors: Tensors, **options: Any) -> None:
    """Write a GGUF file, or a split if `options` of `gguf.GGUFWriter` say so."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"][0], **options)
    for name, (value, type, of) in metadata.items():
        if name != "general.architecture":  # the writer has it
            writer.add_key_value(name, value, type, of)
    for name, (data, type) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_good_gguf(path: Path) -> None:
    """A whole Llama of two layers; llama.cpp runs it."""
    write_model(path, good_metadata(), good_tensors())


# ---------------------------------------------------------------- what blocks decode to


def random_blocks(name: str, *shape: int, seed: int = 0) -> np.ndarray:
    """Random bytes of blocks for weights of that shape."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    row = shape[-1] // block_size * block_bytes
    return np.random.default_rng(seed).integers(0, 256, (*shape[:-1], row), dtype=np.uint8)


def dequantized(raw: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw, GGMLQuantizationType[name])


def assert_same_bits(ours: np.ndarray, wanted: np.ndarray) -> None:
    """Equal bits, and NaN wherever a NaN is wanted: which one is not defined."""
    assert ours.dtype == wanted.dtype
    assert ours.shape == wanted.shape
    is_nan = np.isnan(wanted.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(ours.astype(np.float32)), is_nan)
    unsigned = f"u{wanted.itemsize}"
    np.testing.assert_array_equal(ours.view(unsigned)[~is_nan], wanted.view(unsigned)[~is_nan])
