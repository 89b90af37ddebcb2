"""A small random Llama with a tokenizer, as a checkpoint directory; tokenizers as the hub has them.

The vocabularies are those of `gguf_vocabularies`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf_vocabularies import byte_level
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

from vivace.blocks import weight_refs
from vivace.models import graph_from_config
from vivace.models.config import Config

__all__ = ["PUBLISHED", "published", "write_checkpoint"]

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS_AND_MARKS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_MARKS_AND_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str) -> Split:
    return Split(Regex(pattern), "isolated")


# By name in `tokenizer.ggml.pre`: what comes before bytes are written as letters. None: a pattern
# of the library's own.
PUBLISHED: dict[str, list[Any] | None] = {
    "gpt-2": None,
    "smollm": [Digits(individual_digits=True), None],
    "llama-bpe": [
        _split(rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}")
    ],
    "qwen2": [_split(rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}")],
    "tekken": [_split("|".join((*_LETTERS_AND_MARKS, r"\p{N}", _MARKS_AND_SLASHES)))],
    "gpt-4o": [
        _split(
            "|".join(
                (
                    *(f"{words}{_CONTRACTIONS}?" for words in _LETTERS_AND_MARKS),
                    r"\p{N}{1,3}",
                    _MARKS_AND_SLASHES,
                )
            )
        )
    ],
    "deepseek-v3": [
        _split(r"\p{N}{1,3}"),
        _split("[一-龥\u3040-ゟ゠-ヿ]+"),
        _split(
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
            r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
    ],
}


def published(pre: str) -> Tokenizer:
    """A byte-level tokenizer as models on the hub have it."""
    metadata = byte_level(pre)
    tokens, kinds = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    normal = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))}
    normal = {token: i for token, i in normal.items() if kinds[i] == 1}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(BPE(normal, merges, ignore_merges=pre in ("llama-bpe", "tekken")))
    parts = PUBLISHED[pre]
    if parts is None or parts[-1] is None:
        letters = ByteLevel(add_prefix_space=False)
    else:
        letters = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = Sequence([*(part for part in parts or [] if part), letters])
    backend.normalizer = normalizers.NFC() if pre == "qwen2" else None
    backend.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind != 1:
            backend.add_tokens([AddedToken(token, normalized=False, special=kind == 3)])
    return backend


def write_checkpoint(path: Path, backend: Tokenizer, **tokenizer_config: Any) -> Path:
    """A model whose embedding has rows that no token uses; greedy answers vary."""
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama",
        "vocab_size": backend.get_vocab_size() + 7,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    (path / "config.json").write_text(json.dumps(config))
    backend.save(str(path / "tokenizer.json"))
    roles = {"bos_token": "<|begin|>", "eos_token": "<|im_end|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(roles | tokenizer_config))
    rng = np.random.default_rng(0)
    weights = {
        f"model.{ref.name}" if not ref.name.startswith(("model.", "lm_head")) else ref.name: (
            rng.normal(size=ref.shape) * (0.2 if len(ref.shape) > 1 else 1)
        ).astype(np.float32)
        for ref in weight_refs(graph_from_config(Config(config, "config.json")))
    }
    save_file(weights, path / "model.safetensors")
    return path
