"""Tokens per text with merges and without, and what the others cost `tiny` in bits per character.

    python -m benchmarks.tokenization [--characters N]

The texts are the files of this Python's standard library that `tiny` was not trained on: sources,
and documentation (docstrings and the topics of `help()`). Vocabularies of large models are those
that llama.cpp has for its tests; they are counted where `make peers` has put them. Writes
benchmarks/results/tokenization.json.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import harness
from vivace import LLM
from vivace.measure.perplexity import perplexity
from vivace.measure.windows import windows
from vivace.models.gguf.tokenizer import tokenizer_from_metadata
from vivace.models.segmentation import Tokenization
from vivace.models.tokenizer import Tokenizer
from vivace.training.corpus import read_corpus

MODES: tuple[Tokenization, ...] = ("merges", "greedy", "shortest")
VOCABULARIES = ("llama-bpe", "qwen2", "gpt-2", "llama-spm")


def read_texts(num_characters: int) -> dict[str, str]:
    """Sources and documentation, each up to `num_characters`."""
    parts: dict[str, list[str]] = {"sources": [], "documentation": []}
    for name, lines in read_corpus("heldout").documents:
        kind = "sources" if name.endswith(".py") else "documentation"
        parts[kind].append("\n".join(lines))
    return {kind: "\n\n".join(texts)[:num_characters] for kind, texts in parts.items()}


def tokenizers() -> Iterator[tuple[str, Tokenizer]]:
    with LLM("tiny") as llm:
        yield "tiny", llm.tokenizer
    for name in VOCABULARIES:
        path = harness.PEERS / "source/vendor/llama.cpp/models" / f"ggml-vocab-{name}.gguf"
        if path.exists():
            yield name, tokenizer_from_metadata(_metadata(path), str(path))


def _metadata(path: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


def count(tokenizer: Tokenizer, text: str) -> dict[str, Any]:
    """Tokens by mode, and the share of the tokens by merges that others save."""
    found: dict[str, Any] = {}
    for mode in MODES:
        own = tokenizer if mode == "merges" else tokenizer.without_merges(mode)
        found[mode] = len(own.encode(text, add_special=False))
    saved = {mode: 1 - found[mode] / found["merges"] for mode in MODES[1:]}
    return found | {"saved": saved}


def surprise(text: str) -> dict[str, Any]:
    """Bits per character of `tiny` under each mode, whose tokens differ."""
    found = {}
    for mode in MODES:
        with LLM("tiny", tokenization=mode) as llm:
            before = llm.tokenizer.encode("")
            token_ids = llm.tokenizer.encode(text, add_special=False)
            parts = windows(
                token_ids, llm.max_context, llm.max_context // 2, next(iter(before), None)
            )
            result = perplexity(llm.logits, parts)
        nats = result.nll * result.num_tokens
        found[mode] = {
            "perplexity": result.perplexity,
            "num_tokens": result.num_tokens,
            "bits_per_character": nats / math.log(2) / len(text),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.tokenization")
    parser.add_argument("--characters", type=int, default=400_000, help="of each text, at most")
    arguments = parser.parse_args()
    texts = read_texts(arguments.characters)
    results: dict[str, Any] = {
        "characters": {name: len(text) for name, text in texts.items()},
        "tokens": {
            vocabulary: {name: count(tokenizer, text) for name, text in texts.items()}
            for vocabulary, tokenizer in tokenizers()
        },
        "tiny": {name: surprise(text[: len(text) // 4]) for name, text in texts.items()},
    }
    for vocabulary, found in results["tokens"].items():
        for name, counts in found.items():
            saved = ", ".join(f"{mode} {share:+.2%}" for mode, share in counts["saved"].items())
            print(
                f"{vocabulary:10} {name:14} {counts['merges']:8} tokens by merges; saved: {saved}"
            )
    for name, found in results["tiny"].items():
        bits = ", ".join(f"{mode} {row['bits_per_character']:.4f}" for mode, row in found.items())
        print(f"tiny       {name:14} bits per character: {bits}")
    print(harness.save("tokenization", results))


if __name__ == "__main__":
    main()
