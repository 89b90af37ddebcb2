"""Small vocabularies as the metadata of GGUF files has them, the same in every run.

Merges are learned on a text that is not cut into words first, so that what tokens a text becomes
depends on where a pre-tokenizer cuts it.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vivace.models.detokenizer import bytes_of_letters

__all__ = ["CONTROL", "VOCABULARIES", "byte_level", "raw", "scored", "write_vocabulary"]

CONTROL = ("<|begin|>", "<|im_end|>", "<|user|>", "<|endoftext|>", "<|unused_1|>")
USER_DEFINED = ("<tool>", "<tool>>", "\t\t\t")
NORMAL, UNKNOWN, IS_CONTROL, IS_USER_DEFINED, UNUSED, BYTE = range(1, 7)

TEXT = """The quick brown fox's den isn't where we'LL look; I'M sure they've 12 or 345, and \
67890 more.
Straße, naïve café: Привет, мир! ПРИВЕТ МИР. Ελλάδα και ΕΛΛΆΔΑ? हिन्दी में लिखो, ภาษาไทย, \
العربية ١٢٣.
日本語のテキスト、東京と大阪。中文字符，测试一二三！ \
한국어 텍스트 1,234,567.89 — “quoted” (brackets) [x] {y}
\tdef fibonacci(n):\n\t\treturn n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)  # \
HTTPServer
    for (int i = 0; i <= 10; i++) { total += a[i] * b[i]; }\r\n\r\n\n\n    x == y && z != 0x1F \
|| !w;
http://example.org/a_b/c-d?e=f&g=h  ...  ***  ---  ===  🙂🙃 \
👩\u200d👧 e\u0301e\u0301 n\u0303o ½ ² \
Ⅷ <|user|> <tool>
camelCase getValue HTTPServer XMLName toString; if (x)/\n  y(x);/\n b)/\nc);\n\n}\n\n};\r\n  1  \
2  33  444\n
camelCase getValue HTTPServer XMLName toString; if (x)/\n  y(x);/\n b)/\nc);\n\n}\n\n};\r\n  1  \
2  33  444\n
We'll it's don't they're l'amour İstanbul'da Ankara'dan'da I've I'd  ,  ;  .   !!      six      \
seven       \n\n??\n\n
The  the   THE    the's The'S o'clock O'Clock 'tis 'Tis l'été L'ÉTÉ d'or ﬁne Ａｂｃ \
１２３\u3000全角\u00a0nbsp\u2028end
"""


def byte_level(pre: str) -> dict[str, Any]:
    """Metadata of kind `gpt2` whose texts are cut as `pre` says.

    Some words are tokens that no merges make.
    """
    letters = {byte: letter for letter, byte in bytes_of_letters().items()}
    text = "".join(letters[byte] for byte in TEXT.encode())
    alphabet = sorted(letters.values())
    merges = _learned(text, 900)
    learned = list(dict.fromkeys(left + right for left, right in merges))
    whole = [word for word in ("ĠHello", "world", "Ġzebra", "123") if word not in learned]
    normal = [*alphabet, *learned, *whole]
    tokens = [*normal, *CONTROL, *USER_DEFINED]
    kinds = [*_kinds(len(normal)), *_added_kinds()]
    first = len(normal)
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges],
        "tokenizer.ggml.bos_token_id": first,
        "tokenizer.ggml.eos_token_id": first + 1,
    }


def scored(adds_space: bool = True, has_bytes: bool = True) -> dict[str, Any]:
    """Metadata of kind `llama`: scores instead of merges, ▁ for spaces, bytes as a fallback."""
    text = TEXT.replace(" ", "▁")
    learned = list(dict.fromkeys(left + right for left, right in _learned(text, 500)))
    known = sorted({*text} - {*"日本語🙂\u2028"})
    learned = [token for token in learned if {*token} <= {*known}]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)] if has_bytes else []
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *learned, *known, *CONTROL, *USER_DEFINED]
    num_normal = len(learned) + len(known)
    before = [UNKNOWN, IS_CONTROL, IS_CONTROL, *(BYTE for _ in byte_tokens)]
    scores = [0.0] * len(before) + [-float(rank) for rank in range(num_normal)]
    kinds = [*before, *_kinds(num_normal), *_added_kinds()]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores + [-1000.0] * (len(tokens) - len(scores)),
        "tokenizer.ggml.add_space_prefix": adds_space,
    }


def raw() -> dict[str, Any]:
    """Metadata of kind `gemma4`: merges over ▁ and characters, bytes as a fallback."""
    text = TEXT.replace(" ", "▁")
    merges = [pair for pair in _learned(text, 500) if "\n" not in "".join(pair)]
    known = sorted({*text} - {*"日本語🙂\u2028"})
    merges = [pair for pair in merges if {*"".join(pair)} <= {*known}]
    merges += [("\n", "\n"), ("\n\n", "\n")]
    learned = list(dict.fromkeys(left + right for left, right in merges))
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *byte_tokens, *learned, *known]
    before = [IS_CONTROL, IS_CONTROL, IS_CONTROL, IS_CONTROL, *(BYTE for _ in byte_tokens)]
    kinds = [*before, *_kinds(len(tokens) - len(before)), *_added_kinds()]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": [*tokens, *CONTROL, *USER_DEFINED],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_bos_token": True,
    }


# Every kind but those that differ in `pre` alone.
VOCABULARIES = {
    "scored": scored,
    "scored without a first space": lambda: scored(adds_space=False),
    "raw": raw,
    "byte level": lambda: byte_level("llama-bpe"),
}


def _kinds(count: int) -> list[int]:
    return [NORMAL] * count


def _added_kinds() -> list[int]:
    return [IS_CONTROL] * len(CONTROL) + [IS_USER_DEFINED] * len(USER_DEFINED)


@cache
def _learned(text: str, count: int) -> list[tuple[str, str]]:
    """Merges to tokens of at most 8: the most frequent first, of equal ones the smallest."""
    symbols = list(text)
    merges = []
    for _ in range(count):
        neighbours = pairwise(symbols)
        pairs = Counter(pair for pair in neighbours if len("".join(pair)) <= 8)
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        symbols = _joined(symbols, best)
    return merges


def _joined(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    found, at = [], 0
    while at < len(symbols):
        is_pair = (symbols[at], *symbols[at + 1 : at + 2]) == pair
        found.append("".join(pair) if is_pair else symbols[at])
        at += 1 + is_pair
    return found


def write_vocabulary(metadata: dict[str, Any], path: Path) -> None:
    """A GGUF file without tensors."""
    from gguf import GGUFValueType, GGUFWriter

    writer = GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, list | np.ndarray):
            writer.add_array(key, value if isinstance(value, list) else value.tolist())
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        else:
            writer.add_key_value(key, value, GGUFValueType.UINT32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
