"""Tokens of llama.cpp's own vocabularies, text by text, and of every pre-tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from gguf_vocabularies import write_vocabulary
from peer import LLAMA_CPP, LlamaCpp
from random_texts import random_texts
from read_gguf import read_metadata
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from vivace.errors import UnsupportedModel
from vivace.models.gguf.pre_tokenizers import PRE_TOKENIZERS, exact
from vivace.models.gguf.tokenizer import tokenizer_from_metadata
from vivace.models.tokenizer import Tokenizer

MODELS = LLAMA_CPP / "models"
NAMES = sorted(path.stem.removeprefix("ggml-vocab-") for path in MODELS.glob("*.gguf"))
UNSUPPORTED = {"bert-bge": "bert", "nomic-bert-moe": "t5"}
SUPPORTED = [name for name in NAMES if name not in UNSUPPORTED]
NUM_TEXTS = 10_000
# Non-ASCII spaces behind one of Phi-3's tokens, which the library drops and llama.cpp keeps.
KEPT_SPACES = re.compile(r"[^\x00-\x7f]")


@cache
def read(name: str) -> dict[str, Any]:
    return read_metadata(MODELS / f"ggml-vocab-{name}.gguf")


@pytest.fixture(scope="module", params=SUPPORTED or ["none"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def ours(name: str) -> Tokenizer:
    return tokenizer_from_metadata(read(name), name)


@pytest.fixture(scope="module")
def theirs(name: str) -> Iterator[LlamaCpp]:
    with LlamaCpp(MODELS / f"ggml-vocab-{name}.gguf") as peer:
        yield peer


@pytest.fixture(scope="module")
def texts(name: str) -> list[str]:
    metadata = read(name)
    kinds = zip(
        metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True
    )
    tags = [token for token, kind in kinds if kind in (2, 3, 4)]
    step = max(1, len(tags) // 400)
    return random_texts(2026, NUM_TEXTS, tags[::step])


def test_the_cases_that_come_with_a_vocabulary(name: str, ours: Tokenizer) -> None:
    file = MODELS / f"ggml-vocab-{name}.gguf.inp"
    if not file.exists():
        pytest.skip("it comes without")
    texts = file.read_text("utf-8").split("\n__ggml_vocab_test__\n")
    lines = file.with_suffix(".out").read_text("utf-8").split("\n")
    assert len(texts) > 40
    for text, line in zip(texts, lines[: len(texts)], strict=True):
        assert ours.encode(text, add_special=False) == [*map(int, line.split())], text


def test_plain_text(ours: Tokenizer, theirs: LlamaCpp, texts: list[str]) -> None:
    for text, expected in zip(texts, theirs.tokenize(texts, True, False), strict=True):
        assert ours.encode(text) == expected, text


def test_text_whose_tags_are_tokens(
    name: str, ours: Tokenizer, theirs: LlamaCpp, texts: list[str]
) -> None:
    different = []
    for text, expected in zip(texts, theirs.tokenize(texts, True, True), strict=True):
        if len(expected) > 1 and expected[0] == expected[1] == ours.bos_token_id:
            expected = expected[1:]  # there it is written twice
        if ours.encode(text, allow_special=True) != expected:
            different.append(text)
    if name == "phi-3":
        assert len(different) < NUM_TEXTS / 40
        spaces = (re.sub(r"(?<=\]|>)\s+", _only_ascii, text) for text in different)
        again = [*spaces]
        for text, expected in zip(again, theirs.tokenize(again, False, True), strict=True):
            assert ours.encode(text, False, allow_special=True) == expected, text
    else:
        assert not different


def _only_ascii(spaces: re.Match[str]) -> str:
    return KEPT_SPACES.sub(" ", spaces[0])


def test_text_of_tokens(name: str, ours: Tokenizer, theirs: LlamaCpp) -> None:
    """Token by token: shown ones, hidden ones, and those that are some bytes of a character."""
    count = len(read(name)["tokenizer.ggml.tokens"])
    pieces = theirs.pieces(count)
    different = [
        i for i, piece in enumerate(pieces) if _shown(ours, [i]) != piece.decode("utf-8", "replace")
    ]
    # Tokens that are not written in the letters for bytes, where llama.cpp writes a warning.
    assert all(pieces[index].startswith(b"[UNK_BYTE_0x") for index in different)
    assert len(different) == (1403 if name == "command-r" else 0)


def _shown(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    """Text of tokens that continue a text."""
    stream = tokenizer.detokenizer(tokenizer.encode("a", add_special=False), skip_special=False)
    return "".join([*map(stream.add, token_ids), stream.finish()])


def test_text_of_random_tokens(ours: Tokenizer, theirs: LlamaCpp, texts: list[str]) -> None:
    pieces = theirs.pieces(ours.vocab_size)
    for text in texts[:2000]:
        token_ids = ours.encode(text)[1::2]  # characters fall apart
        expected = b"".join(pieces[item] for item in token_ids).decode("utf-8", "replace")
        if "[UNK_BYTE_0x" not in expected:
            assert _shown(ours, token_ids) == expected


def test_special_tokens(ours: Tokenizer, theirs: LlamaCpp) -> None:
    described = theirs.described
    assert sorted(ours.eog_token_ids) == described["end"]
    assert set(described["control"]) <= ours.special_ids
    assert ours.bos_token_id == described["bos"]
    assert ours.eos_token_id == described["eos"]


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_kinds_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=UNSUPPORTED[name]):
        tokenizer_from_metadata(read(name), name)


ONE_OF_EACH = {facts: name for name, facts in PRE_TOKENIZERS.items() if not facts.is_raw}


@pytest.mark.parametrize("pre", ONE_OF_EACH.values())
def test_every_pre_tokenizer_with_a_large_vocabulary(pre: str, tmp_path: Path) -> None:
    """Llama 3's vocabulary, cut in every way that there is."""
    keys = ("tokens", "token_type", "merges")
    metadata = {f"tokenizer.ggml.{key}": read("llama-bpe")[f"tokenizer.ggml.{key}"] for key in keys}
    metadata |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre}
    write_vocabulary(metadata | {"general.architecture": "llama"}, tmp_path / "v.gguf")
    ours = tokenizer_from_metadata(metadata, pre)
    texts = random_texts(15, 2000)
    with LlamaCpp(tmp_path / "v.gguf") as theirs:
        for text, expected in zip(texts, theirs.tokenize(texts, False, False), strict=True):
            assert ours.encode(text, add_special=False) == expected, text


@pytest.mark.parametrize(("category", "bit"), [("N", 2), ("L", 4), ("M", 16), ("P", 32), ("S", 64)])
def test_categories_of_characters(category: str, bit: int) -> None:
    """The library's patterns and llama.cpp's tables agree on every character there is."""
    source = (LLAMA_CPP / "src" / "unicode-data.cpp").read_text()
    table = source[source.index("unicode_ranges_flags") : source.index("unicode_set_whitespace")]
    rows = [
        (int(first, 16), int(flags, 16))
        for first, flags in re.findall(r"\{0x([0-9A-F]+), 0x([0-9A-F]+)\}", table)
    ]
    ends = [first for first, _ in rows[1:]]
    expected = {
        code
        for (first, flags), end in zip(rows, ends, strict=False)
        if flags & bit
        for code in range(first, end)
    }
    cut = Split(Regex(exact(rf"\p{{{category}}}")), "removed")
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    left = {ord(c) for piece, _ in cut.pre_tokenize_str("".join(map(chr, codes))) for c in piece}
    assert set(codes) - left == expected
