"""Named GGUF files that are whole but say what no model is; each names a fragment of the error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from bad_gguf import Damage, edit_model
from gguf import GGMLQuantizationType, GGUFValueType
from gguf_files import HIDDEN, INNER, LAYERS, Metadata, Tensors

CASES: dict[str, tuple[str, Damage]] = {}
Edit = Callable[[Metadata, Tensors], Any]
UINT32, FLOAT32, STRING = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING
INT32, BOOL, ARRAY = GGUFValueType.INT32, GGUFValueType.BOOL, GGUFValueType.ARRAY
KINDS = {int: UINT32, float: FLOAT32, str: STRING, bool: BOOL}


def edited(name: str, expected: str, edit: Edit) -> None:
    assert name not in CASES
    CASES[name] = (expected, edit_model(edit))


def value(name: str, expected: str, key: str, item: Any, kind: Any = None) -> None:
    """A key of the architecture, or a whole key, with another value; None leaves it out."""
    whole = key if key.startswith(("general.", "tokenizer.")) else f"llama.{key}"

    def edit(metadata: Metadata, tensors: Tensors) -> None:
        metadata.pop(whole, None)
        if item is not None:
            metadata[whole] = (item, kind or KINDS[type(item)], None)

    edited(name, expected, edit)


def listed(name: str, expected: str, key: str, items: list[Any], kind: GGUFValueType) -> None:
    def edit(metadata: Metadata, tensors: Tensors) -> None:
        metadata[key] = (items, ARRAY, kind)

    edited(name, expected, edit)


# ---------------------------------------------------------------- what the architecture says

value("no architecture", "'general.architecture' is missing", "general.architecture", "")
value("architecture unknown", "architecture 'mamba9' is not", "general.architecture", "mamba9")
value("architecture near", "did you mean llama", "general.architecture", "lama")
value(
    "architecture of another key", "qwen2.block_count' is missing", "general.architecture", "qwen2"
)
for field in ("block_count", "embedding_length", "attention.head_count", "feed_forward_length"):
    value(f"no {field}", f"'llama.{field}' is missing", field, None)
    value(f"zero {field}", f"llama.{field}' is 0", field, 0)
    value(f"text for {field}", f"llama.{field}' is 'many'", field, "many")
    value(f"true for {field}", f"llama.{field}' is True", field, True)
value("no context", "'llama.context_length' is missing", "context_length", None)
value("zero context", "llama.context_length' is 0", "context_length", 0)
value("a billion layers", "llama.block_count' is 1000000000", "block_count", 10**9)
value("2^32-1 heads", "attention.head_count' is 4294967295", "attention.head_count", 2**32 - 1)
value("heads do not divide", "expected a divisor", "attention.head_count_kv", 3)
value("zero KV heads", "attention.head_count_kv' is 0", "attention.head_count_kv", 0)
value("layers fewer than tensors", "has no place", "block_count", LAYERS - 1)
value("layers more than tensors", "'blk.2.attn_q.weight' is missing", "block_count", LAYERS + 1)
value("width of another model", "the config expects", "embedding_length", HIDDEN * 2)
value("inner size of another model", "the config expects", "feed_forward_length", INNER + 1)
value("key size odd", "at most the head size", "attention.key_length", 15)
value("value size of its own", "values of another size", "attention.value_length", 8)
value("rotary size above the head", "at most the head size", "rope.dimension_count", 32)
value("rotary size odd", "even rotary size", "rope.dimension_count", 7)
value("no epsilon", "'llama.attention.layer_norm_rms_epsilon' is missing",
      "attention.layer_norm_rms_epsilon", None)  # fmt: skip
value("epsilon negative", "rms_epsilon' is -1", "attention.layer_norm_rms_epsilon", -1.0)
value("epsilon NaN", "rms_epsilon' is nan", "attention.layer_norm_rms_epsilon", float("nan"))
value("rope base negative", "rope.freq_base' is -1", "rope.freq_base", -1.0)
value("rope base infinite", "rope.freq_base' is inf", "rope.freq_base", float("inf"))
value("rope base text", "rope.freq_base' is 'ten'", "rope.freq_base", "ten")
value("rope kind unknown", "rope.scaling.type is 'spiral'", "rope.scaling.type", "spiral")
value("rope factor negative", "rope.scaling.factor' is -2", "rope.scaling.factor", -2.0)
value("experts without counts", "expert_used_count' is missing", "expert_count", 4)
listed("head counts per layer", "differs from layer to layer", "llama.attention.head_count",
       [4, 2], UINT32)  # fmt: skip
listed("head counts too few", "or 2 of them", "llama.attention.head_count", [4], UINT32)
listed("head counts negative", "or 2 of them", "llama.attention.head_count", [4, -4], INT32)
listed("head counts text", "or 2 of them", "llama.attention.head_count", ["4", "4"], STRING)
listed("layers a list", "llama.block_count' is", "llama.block_count", [2, 2], UINT32)

# ---------------------------------------------------------------- tensors


def tensor(name: str, expected: str, change: Callable[[Tensors], Any]) -> None:
    edited(name, expected, lambda metadata, tensors: change(tensors))


F32, I32 = GGMLQuantizationType.F32, GGMLQuantizationType.I32
Q8_0 = GGMLQuantizationType.Q8_0
NAN_BLOCKS = np.full((96, 68), 255, np.uint8)


def put(name: str, array: np.ndarray, kind: GGMLQuantizationType = F32) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: (array, kind)})


for gone in ("token_embd.weight", "output_norm.weight", "blk.1.attn_k.weight",
             "blk.0.ffn_down.weight", "blk.1.ffn_norm.weight"):  # fmt: skip
    tensor(f"without {gone}", f"'{gone}' is missing", lambda tensors, gone=gone: tensors.pop(gone))
tensor("no tensors", "is missing", lambda tensors: tensors.clear())
tensor("a norm of 63", "has shape [63]", put("output_norm.weight", np.ones(63, np.float32)))
tensor("a norm of two axes", "has shape [1, 64]",
       put("output_norm.weight", np.ones((1, 64), np.float32)))  # fmt: skip
tensor("a matrix transposed", "has shape [64, 96]",
       put("blk.0.ffn_up.weight", np.ones((64, 96), np.float32)))  # fmt: skip
tensor("a bias without its block", "has no place",
       put("blk.0.attn_q.bias", np.ones(64, np.float32)))  # fmt: skip
tensor("a layer too many", "'blk.7.attn_q.weight' has no place",
       put("blk.7.attn_q.weight", np.ones((64, 64), np.float32)))  # fmt: skip
tensor("integers for a matrix", "is stored as int32",
       put("blk.0.ffn_up.weight", np.ones((96, 64), np.int32), I32))  # fmt: skip
tensor("NaN in a norm", "NaN or infinite",
       put("output_norm.weight", np.full(64, np.nan, np.float32)))  # fmt: skip
tensor("infinity in a matrix", "NaN or infinite",
       put("blk.1.ffn_up.weight", np.full((96, 64), np.inf, np.float32)))  # fmt: skip
tensor("NaN for block scales", "NaN or infinite",
       put("blk.1.ffn_up.weight", NAN_BLOCKS, Q8_0))  # fmt: skip
tensor("rope factors too few", "short_factor", put("rope_freqs.weight", np.ones(3, np.float32)))
tensor("rope factors of zero", "short_factor", put("rope_freqs.weight", np.zeros(8, np.float32)))
tensor("long rope factors alone", "rope_factors_short.weight",
       put("rope_factors_long.weight", np.ones(8, np.float32)))  # fmt: skip

# ---------------------------------------------------------------- tokenizer

TOKENS = "tokenizer.ggml.tokens"


def drop_rows(metadata: Metadata, tensors: Tensors) -> None:
    array, kind = tensors["token_embd.weight"]
    tensors["token_embd.weight"] = (array[:-5], kind)


def tokens_a_number(metadata: Metadata, tensors: Tensors) -> None:
    del metadata["llama.vocab_size"]
    metadata[TOKENS] = (7, UINT32, None)


edited("tokens a number", "'llama.vocab_size' is missing", tokens_a_number)
edited("embedding with fewer rows than tokens", "'token_embd.weight' has shape", drop_rows)
value("vocabulary size of another model", "'token_embd.weight' has shape", "vocab_size", 99)
value("tokenizer kind unknown", "tokenizer.ggml.model is 'magic'", "tokenizer.ggml.model", "magic")
value("tokenizer kind a number", "'tokenizer.ggml.model' is 7", "tokenizer.ggml.model", 7)
value("pre-tokenizer unknown", "tokenizer.ggml.pre", "tokenizer.ggml.pre", "nobody-knows")
value("end token out of range", "eos_token_id", "tokenizer.ggml.eos_token_id", 10**6)
value("end token negative", "eos_token_id", "tokenizer.ggml.eos_token_id", -1, INT32)
value("begin token text", "bos_token_id", "tokenizer.ggml.bos_token_id", "first")
value("no merges", "tokenizer.ggml.merges", "tokenizer.ggml.merges", None)
value("merges one text", "tokenizer.ggml.merges", "tokenizer.ggml.merges", "a b")
value("tokens a text", "tokenizer.ggml.tokens", TOKENS, "abc")
listed("tokenizer kinds", "tokenizer.ggml.model' is", "tokenizer.ggml.model", [1, 2], INT32)
value("temperature a text", "general.sampling.temp' is 'hot'", "general.sampling.temp", "hot")
value("chat template a number", "tokenizer.chat_template", "tokenizer.chat_template", 7)
value("chat template of 2 MB", "longer than", "tokenizer.chat_template", "x" * 2**21)
value("begin flag a text", "add_bos_token", "tokenizer.ggml.add_bos_token", "yes")
listed("merge of one part", "tokenizer.ggml.merges", "tokenizer.ggml.merges", ["ab"], STRING)
listed("merge into no token", "tokenizer.ggml.merges", "tokenizer.ggml.merges", ["x y"], STRING)
listed("token types too few", "token_type", "tokenizer.ggml.token_type", [1, 1], INT32)
listed("tokens numbers", "tokenizer.ggml.tokens", TOKENS, [1, 2], INT32)
