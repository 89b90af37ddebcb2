"""The name in `tokenizer.ggml.pre` of how a byte-level tokenizer cuts texts, told by its patterns.

The patterns that models are published with mean the same as llama.cpp's for nearly all texts. Where
they do not, programs that read GGUF cut a text otherwise than the program a model was trained with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from vivace.models.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenizerFacts

__all__ = ["cuts_like", "find_pre_name", "is_byte_level"]

Cuts = tuple[str, ...]

# Of several names for the same cuts, those of the models that made them known.
_COMMON = ("llama-bpe", "gpt-2", "smollm", "qwen2", "gpt-4o")

_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_MARKS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+",
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*",
)
_CASED_MARKS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_DIGIT, _THREE_DIGITS = r"\p{N}", r"\p{N}{1,3}"
_EAST_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_HAN_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)

# The patterns of tokenizers on the hub, by a name that llama.cpp's converter gives them.
_PUBLISHED: dict[str, Cuts] = {
    "gpt-2": (_GPT2,),
    "smollm": (_DIGIT, _GPT2),
    "llama-bpe": (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{_THREE_DIGITS}|{_MARKS}",),
    "qwen2": (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{_DIGIT}|{_MARKS}",),
    "qwen35": (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|{_DIGIT}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
    ),
    "tekken": (f"{_CASED[0]}|{_CASED[1]}|{_DIGIT}|{_CASED_MARKS}",),
    "gpt-4o": (
        f"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|{_THREE_DIGITS}|{_CASED_MARKS}",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, _DIGIT),
    "deepseek-v3": (_THREE_DIGITS, _HAN_AND_KANA, _DEEPSEEK3),
}


def is_byte_level(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    """Whether a pre-tokenizer of a tokenizer.json writes bytes as letters."""
    return any(step["type"] == "ByteLevel" for step in _steps(pre_tokenizer))


def find_pre_name(pre_tokenizer: Mapping[str, Any] | None, ignores_merges: bool) -> str | None:
    """The name for a pre-tokenizer of a tokenizer.json, None where no pattern is known.

    `ignores_merges` as in `PreTokenizerFacts`.
    """
    names = (*_COMMON, *PRE_TOKENIZERS)
    return next((name for name in names if cuts_like(name, pre_tokenizer, ignores_merges)), None)


def cuts_like(name: str, pre_tokenizer: Mapping[str, Any] | None, ignores_merges: bool) -> bool:
    """Whether a known name stands for what a pre-tokenizer of a tokenizer.json does."""
    facts = PRE_TOKENIZERS[name]
    is_alike = facts.is_raw != is_byte_level(pre_tokenizer)
    is_alike = is_alike and facts.ignores_merges == ignores_merges
    return is_alike and _cuts(pre_tokenizer) in _spellings(facts)


@cache
def _spellings(facts: PreTokenizerFacts) -> frozenset[Cuts | None]:
    """The published patterns of these cuts, and those of a tokenizer made from a GGUF file."""
    own = _cuts(json.loads(facts.build().__getstate__()))
    published = {
        cuts for name, cuts in _PUBLISHED.items() if PRE_TOKENIZERS[name].patterns == facts.patterns
    }
    return frozenset({own} | published)


def _cuts(pre_tokenizer: Mapping[str, Any] | None) -> Cuts | None:
    """The patterns, one after the other; None for steps that are no such patterns."""
    found: list[str] = []
    is_spelled = False
    for step in _steps(pre_tokenizer):
        if is_spelled:
            if step["type"] != "Split" or step["behavior"] != "Removed":
                return None
            continue  # letters for bytes that a vocabulary has no tokens for
        is_spelled = step["type"] == "ByteLevel"
        pattern = _pattern(step)
        if pattern is None:
            return None
        found += [pattern] if pattern else []
    return tuple(found)


def _pattern(step: Mapping[str, Any]) -> str | None:
    """The pattern of one step, empty where it cuts nothing, None where it is of another kind."""
    match step:
        case {"type": "Split", "pattern": {"Regex": pattern}, "invert": False}:
            behavior = step["behavior"]
            return pattern if behavior == "Isolated" else f"{behavior} {pattern}"
        case {"type": "Digits", "individual_digits": is_single}:
            return _DIGIT if is_single else rf"{_DIGIT}+"
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return _GPT2 if use_regex else ""
    return None


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return
    if pre_tokenizer["type"] != "Sequence":
        yield pre_tokenizer
        return
    for part in pre_tokenizer["pretokenizers"]:
        yield from _steps(part)
