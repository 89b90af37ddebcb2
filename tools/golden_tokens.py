"""Writes tests/data/tokens.json: what llama.cpp makes of texts with the vocabularies of the tests.

    make peers && .venv/bin/python tools/golden_tokens.py

With it, tests compare with llama.cpp where it is not installed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "peers")]

from gguf_vocabularies import VOCABULARIES, byte_level, write_vocabulary  # noqa: E402
from peer import LlamaCpp, has_peers  # noqa: E402
from random_texts import FIXED_TEXTS, random_texts  # noqa: E402

from vivace.models.gguf.pre_tokenizers import PRE_TOKENIZERS  # noqa: E402

GOLDEN = ROOT / "tests" / "data" / "tokens.json"
TAGS = ("<|user|>", "<|begin|>", "<|im_end|>", "<tool>", "<s>")


def main() -> None:
    if not has_peers():
        sys.exit("llama.cpp is not here: `make peers` builds it")
    texts = [*FIXED_TEXTS, *random_texts(7, 12, TAGS)]
    texts = [text for text in texts if len(text) <= 150]
    cases = {name: _kind(make(), texts) for name, make in VOCABULARIES.items()}
    pre = _pre_tokenizers(texts)
    _write({"texts": texts, "kinds": cases, "pre": pre})


def _kind(metadata: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """Tokens of texts whose tags stay text, and of texts whose tags become tokens."""
    with _opened(metadata) as peer:
        return {
            "end": peer.described["end"],
            "plain": _spelled(peer.tokenize(texts, True, False)),
            "parsed": _spelled(peer.tokenize(texts, True, True)),
        }


def _pre_tokenizers(texts: list[str]) -> dict[str, Any]:
    """By the first of the names that give the same tokens: these names, and the tokens."""
    found: dict[str, dict[str, Any]] = {}
    for name, facts in PRE_TOKENIZERS.items():
        if facts.is_raw:
            continue
        with _opened(byte_level(name)) as peer:
            tokens = _spelled(peer.tokenize(texts, True, False))
        same = next((case for case in found.values() if case["tokens"] == tokens), None)
        if same is None:
            found[name] = {"names": [name], "tokens": tokens}
        else:
            same["names"].append(name)
    return found


def _opened(metadata: dict[str, Any]) -> LlamaCpp:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        write_vocabulary(metadata, path)
        return LlamaCpp(path)


def _spelled(rows: list[list[int]]) -> list[str]:
    return [" ".join(map(str, row)) for row in rows]


def _write(data: dict[str, Any]) -> None:
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(data, ensure_ascii=True, indent=0) + "\n", encoding="utf-8")
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes, {len(data['texts'])} texts")


if __name__ == "__main__":
    main()
