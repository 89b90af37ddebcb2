"""Texts that tokenizers disagree on: scripts, emoji, spaces, digits, broken UTF-8, tags."""

from __future__ import annotations

import random
import sys
import unicodedata
from collections.abc import Sequence

__all__ = ["FIXED_TEXTS", "random_texts"]

_WORDS = """The quick brown fox's don't WE'LL I'M they've hELLO camelCase HTTPServer snake_case
ÉCOLE straße naïve œuvre Привет ПРИВЕТ мир Ελλάδα ΕΛΛΆΔΑ שלום عربي हिन्दी বাংলা ไทย ქართული ᲐᲑ
한국어 日本語 ひらがな カタカナ 中文字 𠀀𪚥 ᏣᎳᎩ 1234567 ½ Ⅷ ² ١٢٣ ३४५ 3.14 1,000,000 0x1F e\u0301
n\u0303o ﬁne Ａｂｃ ｱｲｳ ſ K İ ß 'ſ 'S 'Ll http://a.b/c?d=e&f"""
_EMOJI = "🙂 🙃 👩\u200d👩\u200d👧 🏳️\u200d🌈 🇫🇷 ❤️ ✅ 1️⃣ 🚀"
_SPACES = [" ", "  ", "   ", " " * 7, "\t", "\n", "\r\n", "\n\n\n", " \n", "\n ", "\t\t "]
_ODD_SPACES = ["\u00a0", "\u3000", "\u2003\u2003", "\u2028", "\u0085", "\x0b", "\x0c", "\u200b"]
_SIGNS = [*"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~¡¿«»—…·•§¶±×÷€£¥°µ™©®←→∀∃≤≥", "...", "->", "**", "//"]
_SIGNS += [
    "/*",
    "</",
    "<|",
    "|>",
    "▁",
    "▁▁",
    "Ġ",
    "<0x0A>",
    "、。",
    "！？",
    "\u0300",
    "\u20d0",
    "\ufeff",
    "\x1c",
]

FIXED_TEXTS = [
    "",
    " ",
    "   ",
    "\n",
    "\t\n  \r\n",
    "Hello world",
    " The  the   THE    the",
    "don't WE'LL I'M they'VE l'été 'tis '\u017f",
    "HTTPServer camelCase ÉcOLE ΕΛΛΆδα ПРИвет",
    "1 12 123 1234 12345 1,234,567 x1y22z333",
    "١٢٣ ३४५ １２３ ½ ² Ⅷ",
    "日本語のテキスト、東京。中文，测试！ 한국어",
    "ภาษาไทย हिन्दी में العربية",
    "e\u0301e\u0301 n\u0303o \u0300\u0301 ﬁne Ａｂｃ",
    "🙂🙃 👩\u200d👧 🏳️\u200d🌈 \U0001fae9 \U00016d40\U00016d70",
    "a\u00a0b\u3000c\u2003\u2003d\u2028e\u0085f \u3000\u3000x",
    " Hello zebra getValue XMLName; y(x);/\n  c);\n\n}\n\n",
    "a  1  22  333  444\n\n!!\n\n  ,  x'da Ankara'dan we'll 1'S",
    "x" + " " * 7 + "y" + " " * 9 + "z\t\t\t\t" + " " * 17,
    "a\x00b\x01\x1c\x1dc\x7fd\ufeff\u200b",
    "trailing  \n\n  x \n",
    "(a+b)*c==d && e!=f; // **bold** __x__ <|im|> ... '' \"\"",
    "http://a.b/c_d?e=f#g ---- ==== ####",
    "\ufffd\ufffd\u0378\ue000\U000f0000",
    "▁a ▁▁ Ġx <0x0A> <unk> <s>",
]


def random_texts(seed: int, count: int, tags: Sequence[str] = ()) -> list[str]:
    """Texts of up to some forty parts, the same for the same arguments."""
    random_ = random.Random(seed)
    return [_text(random_, tags) for _ in range(count)]


def _text(random_: random.Random, tags: Sequence[str]) -> str:
    parts = [_part(random_, tags) for _ in range(random_.choice((1, 2, 3, 5, 8, 13, 40)))]
    return random_.choice(("", "", " ")).join(parts)


def _part(random_: random.Random, tags: Sequence[str]) -> str:
    kind = random_.randrange(12)
    if kind < 3:
        return random_.choice(_WORDS.split())
    if kind == 3:
        return random_.choice(_SPACES + _ODD_SPACES) * random_.choice((1, 1, 1, 2, 5))
    if kind == 4:
        return random_.choice(_SIGNS) * random_.choice((1, 1, 2, 3))
    if kind == 5:
        return str(random_.randrange(10 ** random_.randrange(1, 12)))
    if kind == 6:
        return random_.choice(_EMOJI.split())
    if kind == 7:
        return "".join(_character(random_) for _ in range(random_.randrange(1, 8)))
    if kind == 8:
        return random_.randbytes(random_.randrange(1, 9)).decode("utf-8", "replace")
    if kind == 9:
        return chr(random_.randrange(0x20)) * random_.choice((1, 2))
    if kind == 10 and tags:
        return random_.choice(tags)
    return "".join(random_.choice("aeiounrstlAEIOU") for _ in range(random_.randrange(1, 15)))


def _character(random_: random.Random) -> str:
    """Any assigned or unassigned character but a surrogate, common planes more often."""
    top = random_.choice((0x250, 0x3000, 0x10000, 0x20000, sys.maxunicode + 1))
    while True:
        character = chr(random_.randrange(top))
        if unicodedata.category(character) != "Cs":
            return character
