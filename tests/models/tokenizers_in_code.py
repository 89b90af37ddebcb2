"""Small tokenizers of every kind that checkpoints use, built in code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tokenizers.processors import TemplateProcessing

TEXT = (
    """The quick brown fox jumps over the lazy dog. Straße, naïve café, 東京 and Ελλάδα.
A tokenizer learns pairs: the, then, there, these; 12 and 345; (brackets) [and] {braces}.
"""
    * 4
)
SPECIALS = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>")
PIECES = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_level() -> Tokenizer:
    """As Llama 3 and Qwen: bytes as letters, a split by pattern."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    _begin_first(backend)
    return backend


def byte_fallback() -> Tokenizer:
    """As Llama 2: spaces as ▁, unknown characters as bytes, the first space dropped."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", *SPECIALS, *byte_tokens], show_progress=False
    )
    backend.train_from_iterator([TEXT.replace("東京", "")], trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = [
        token for token in state["added_tokens"] if token["content"] not in byte_tokens
    ]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    _begin_first(backend)
    return backend


def metaspace() -> Tokenizer:
    """Spaces as ▁, put before the first word only."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", *SPECIALS], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    _begin_first(backend)
    return backend


def word_piece() -> Tokenizer:
    """Words cut into pieces that begin with ##."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=True)
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["<unk>", *SPECIALS], show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    return backend


def _begin_first(backend: Tokenizer) -> None:
    begin = backend.token_to_id("<|begin|>")
    backend.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )


KINDS = {
    "byte level": byte_level,
    "byte fallback": byte_fallback,
    "metaspace": metaspace,
    "word piece": word_piece,
}


def save(backend: Tokenizer, path: Path, config: Mapping[str, Any] | None = None) -> Path:
    """Write tokenizer.json and tokenizer_config.json."""
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(fields | dict(config or {})))
    return path
