"""How byte-level vocabularies of GGUF files cut a text before merging: `tokenizer.ggml.pre`.

A name stands for patterns that are applied one after the other, each to the pieces that the one
before left. They are facts of llama.cpp's `src/llama-vocab.cpp` and `src/unicode.cpp` and follow
what its code does where that differs from the patterns that models were trained with: contractions
match ASCII letters only, no text is normalised, and the categories of characters are those of
Unicode 15.1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Sequence, Split

from vivace.errors import UnsupportedModel, nearest

__all__ = ["PRE_TOKENIZERS", "PreTokenizerFacts", "exact", "find_pre_tokenizer"]


def _characters(ranges: str) -> str:
    """The inside of a bracketed class, from hexadecimal ranges."""
    spelled = (part.split("-") for part in ranges.split())
    return "".join("-".join(rf"\x{{{code}}}" for code in codes) for codes in spelled)


# Characters of Unicode 16 that are letters, numbers, marks, punctuation or symbols. llama.cpp's
# tables do not know them; the library's do.
_NEWER = _characters(
    "897 1B4E-1B4F 1B7F 1C89-1C8A 2427-2429 31E4-31E5 A7CB-A7CD A7DA-A7DC 105C0-105F3 10D40-10D8F "
    "10EC2-10EFC 11380-113E2 116D0-116E3 11BC0-11BF9 11F5A 13460-143FA 16100-16139 16D40-16D79 "
    "18CFF 1CC00-1CEB3 1E5D0-1E5FF 1F8B2-1F8C1 1FA89-1FA8F 1FABE 1FAC6 1FADC-1FADF 1FAE9 "
    "1FBCB-1FBEF"
)

# Letters of scripts with case, as DeepSeek's first tokenizer lists them.
_CASED = _characters(
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 "
    "388-38A 38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA "
    "1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 "
    "1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB "
    "1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D "
    "212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 "
    "A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A "
    "FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
_EAST_ASIAN = _characters("800-9FA5 AC00-D7FF")
_HAN_AND_KANA = _characters("4E00-9FA5 3040-30FF")

# ---------------------------------------------------------------- patterns

_ANY_CASE = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ANY_CASE}|{_WORD}\p{{N}}{{1,3}}|{_MARKS}{_SPACES}"
_QWEN2 = rf"{_ANY_CASE}|{_WORD}\p{{N}}|{_MARKS}{_SPACES}"
_QWEN35 = (
    rf"{_ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
# Words that change from upper to lower case; letters outside ASCII count as both.
_UPPER, _LOWER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ANY_CASE}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ANY_CASE}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_LETTERS_AND_MARKS = rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+{_ANY_CASE}?"
_PUNCTUATED = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
_DEEPSEEK3 = (
    rf"{_PUNCTUATED}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_BLOOM = rf" ?[^(\s|.,!?{_characters('2026 3002 FF0C 3001 964 6D4 60C')})]+"
_NEW_LINES = r"\n+"
# Digits in threes from the right; what stands before a number stays with its first group.
_THREES = r"(?<!\p{N})\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))|\p{N}{3}"


@dataclass(frozen=True, slots=True)
class PreTokenizerFacts:
    """What a name in `tokenizer.ggml.pre` stands for.

    Attributes:
        patterns: applied in turn; each match is a piece, and so is what lies between matches.
        ignores_merges: a piece that is a token of the vocabulary is not built by merges.
        adds_bos: where the file does not say whether texts begin with the first token.
        groups_digits: numbers are cut in threes before the patterns.
        is_raw: spaces are written as ▁ and bytes as <0xFF>, not as letters.
    """

    patterns: tuple[str, ...]
    ignores_merges: bool = False
    adds_bos: bool = False
    groups_digits: bool = False
    is_raw: bool = False

    def build(self, missing_letters: str = "") -> PreTokenizer:
        """The library's pre-tokenizer.

        Like llama.cpp, it leaves out bytes whose letters are missing from the vocabulary; what
        stands on their two sides does not join.
        """
        parts: list[PreTokenizer] = []
        if self.groups_digits:
            parts.append(Split(Regex(exact(_THREES)), behavior="merged_with_previous"))
        parts += [Split(Regex(exact(item)), behavior="isolated") for item in self.patterns]
        if not self.is_raw:
            parts.append(ByteLevel(add_prefix_space=False, use_regex=False))
        if missing_letters:
            parts.append(Split(Regex(f"[{re.escape(missing_letters)}]"), behavior="removed"))
        return Sequence(parts)


def exact(pattern: str) -> str:
    """A pattern whose categories leave out the characters that llama.cpp does not know."""
    return re.sub(
        r"\\p\{(\w)\}", rf"[\\p{{\1}}&&[^{_NEWER.replace(chr(92), chr(92) * 2)}]]", pattern
    )


_Facts = PreTokenizerFacts
_DIGIT_THEN_GPT2 = _Facts((r"\p{N}", _GPT2))

_FACTS = {
    "default": _Facts((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2": _Facts(
        (_LLAMA3,), ignores_merges=True, adds_bos=True
    ),
    "dbrx smaug-bpe chatglm-bpe": _Facts((_LLAMA3,)),
    "glm4 glm5": _Facts((_LLAMA3,), ignores_merges=True),
    "gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat a.x-4.0 mellum exaone4": _Facts(
        (_GPT2,)
    ),
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": _DIGIT_THEN_GPT2,
    "qwen2 deepseek-r1-qwen stablelm2 hunyuan solar-open megrez kormo f2llmv2 grok-2": _Facts(
        (_QWEN2,)
    ),
    "qwen35": _Facts((_QWEN35,)),
    "tekken": _Facts((_TEKKEN,), ignores_merges=True, adds_bos=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": _Facts((_GPT4O,)),
    "deepseek-llm": _Facts(
        (
            r"[\r\n]",
            rf"\s?[{_CASED}]+",
            rf"\s?[!-/:-~{_characters('FF01-FF0F FF1A-FF5E 2018-201F 3001-3002')}]+",
            r"(?<!\s)\s+\z",
            rf"[[{_EAST_ASIAN}]&&\S]+",
            r"\p{N}+",
        )
    ),
    "deepseek-coder": _Facts(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", rf"[[{_EAST_ASIAN}]&&\S]+", r"\p{N}")
    ),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": _Facts(
        (r"\p{N}{1,3}", rf"[{_HAN_AND_KANA}]+", _DEEPSEEK3)
    ),
    "spark2_5": _Facts(
        (
            r"\p{N}{1,3}",
            rf"[{_HAN_AND_KANA}]+",
            rf"{_PUNCTUATED}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
            r"| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+",
            r"\p{N}",
        )
    ),
    "falcon": _Facts((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    "minicpm5": _Facts(
        (r"\p{N}{1,3}", rf"{_ANY_CASE}|{_WORD}\p{{N}}+|{_MARKS}{_SPACES}"), ignores_merges=True
    ),
    "laguna": _Facts((_NEW_LINES, _QWEN2)),
    "ufakzeka": _Facts((rf"{_WORD}\p{{N}}|{_MARKS}{_SPACES}",)),
    "seed-coder": _Facts((rf"{_ANY_CASE}|{_WORD}\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)),
    "bailingmoe bailingmoe2 llada-moe": _Facts(
        (
            rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORD}\p{{N}}|{_MARKS}"
            r"\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "exaone-moe": _Facts(
        (
            rf"{_ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "jais-2": _Facts(
        (
            rf"{_ANY_CASE}|{_WORD}\p{{N}}{{1,3}}|{_MARKS}\s*[\r\n]+|"
            + "".join(rf"\s{{{2**power}}}(?!\S)|" for power in range(9, 1, -1))
            + r"\s{1,2}(?!\S)|\s{1}",
        )
    ),
    "bloom gpt3-finnish poro-chat": _Facts((_BLOOM,)),
    "viking": _Facts((_BLOOM, r"\p{N}")),
    "chameleon": _Facts(
        (
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        adds_bos=True,
    ),
    "youtu": _Facts(
        (
            rf"[{_characters('AC00-D7A3 3131-318E')}]+"
            rf"|[{_characters('FF01 2026 201C 201D 2018 2019 2014 FF1A FF1B FF0C 3001-303F')}"
            rf"{_characters('FE30-FE4F')}]+"
            rf"|[{_characters('3105-312F')}]+|[{_HAN_AND_KANA}]+",
            rf"{_LETTERS_AND_MARKS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
        ),
        ignores_merges=True,
    ),
    "tiny_aya cohere2moe": _Facts(
        (rf"{_LETTERS_AND_MARKS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",),
        groups_digits=True,
    ),
    "afmoe": _Facts(
        (
            "["
            + _characters(
                "4E00-9FFF 3400-4DBF 8C48-FAFF 3040-30FF FF65-FF9F 2F00-2FDF E40-EFF 1780-17FF "
                "1000-109F AA60-AA7F A9E0-A9FF AC00-D7AF 1100-11FF"
            )
            + "]+",
            _DEEPSEEK3,
        ),
        groups_digits=True,
    ),
    "gemma4": _Facts((_NEW_LINES,), adds_bos=True, is_raw=True),
    "sarvam-moe": _Facts((_NEW_LINES,), is_raw=True),
}

PRE_TOKENIZERS = {name: facts for names, facts in _FACTS.items() for name in names.split()}


def find_pre_tokenizer(name: str, source: str) -> PreTokenizerFacts:
    """The facts of a name. Raises `UnsupportedModel`."""
    if name not in PRE_TOKENIZERS:
        raise UnsupportedModel(
            f"{source}: tokenizer.ggml.pre is '{name}', which is not supported: "
            f"{nearest(name, PRE_TOKENIZERS)}"
        )
    return PRE_TOKENIZERS[name]
