"""Tokens without merges are the longest first or the fewest, and spell the same text."""

from __future__ import annotations

import itertools
import time
from functools import cache

import pytest
from gguf_vocabularies import CONTROL, VOCABULARIES, byte_level, raw, scored
from hypothesis import given, settings
from hypothesis import strategies as st
from random_texts import FIXED_TEXTS, random_texts
from tokenizers import Tokenizer as Backend
from tokenizers import models
from tokenizers_in_code import KINDS, save

from vivace import LLM
from vivace.errors import InvalidOption
from vivace.models.gguf.tokenizer import tokenizer_from_metadata
from vivace.models.tokenizer import Tokenizer

MODES = ("greedy", "shortest")
TEXTS = [*FIXED_TEXTS, *random_texts(5, 150, CONTROL)]


@pytest.fixture(scope="module", params=VOCABULARIES)
def tokenizer(request):
    return tokenizer_from_metadata(VOCABULARIES[request.param](), "x.gguf")


@pytest.mark.parametrize("mode", MODES)
def test_the_text_is_the_same(tokenizer, mode):
    ours = tokenizer.without_merges(mode)
    for text in TEXTS:
        for allow_special in (False, True):
            token_ids = ours.encode(text, allow_special=allow_special)
            expected = tokenizer.encode(text, allow_special=allow_special)
            assert ours.decode(token_ids, False) == tokenizer.decode(expected, False)
            control = [item for item in expected if item in tokenizer.special_ids]
            assert [item for item in token_ids if item in tokenizer.special_ids] == control


def test_fewer_tokens_than_by_merges(tokenizer):
    greedy, shortest = map(tokenizer.without_merges, MODES)
    counts = [
        (len(tokenizer.encode(text)), len(greedy.encode(text)), len(shortest.encode(text)))
        for text in TEXTS
    ]
    assert all(by_merges >= fewest <= longest for by_merges, longest, fewest in counts)
    assert any(by_merges > fewest for by_merges, _, fewest in counts)


def test_the_longest_first_are_not_always_the_fewest():
    metadata = byte_level("gpt-2")
    metadata["tokenizer.ggml.tokens"] += ["abc", "bcdef"]
    metadata["tokenizer.ggml.token_type"] += [1, 1]
    tokenizer = tokenizer_from_metadata(metadata, "x.gguf")
    spelled = {
        mode: [*map(tokenizer.id_to_token, tokenizer.without_merges(mode).encode("abcdef"))]
        for mode in MODES
    }
    assert spelled["greedy"][0] == "abc"
    assert spelled["shortest"] == ["a", "bcdef"]


def test_greedy_is_what_the_library_calls_word_piece():
    """That one takes cubic time for long words, so it only serves to compare."""
    metadata = byte_level("qwen2")
    tokenizer = tokenizer_from_metadata(metadata, "x.gguf")
    theirs = Backend.from_str(tokenizer._backend.to_str())
    kinds = zip(
        metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True
    )
    vocabulary = {token: index for index, (token, kind) in enumerate(kinds) if kind == 1}
    theirs.model = models.WordPiece(
        vocabulary, unk_token="A", continuing_subword_prefix="", max_input_chars_per_word=10**6
    )
    ours = tokenizer.without_merges("greedy")
    for text in TEXTS:
        theirs.encode_special_tokens = True
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special=False) == expected


def test_no_way_is_shorter():
    """Against a search over every way to cut a piece, and its rule for ties."""
    tokenizer = tokenizer_from_metadata(byte_level("gpt-2"), "x.gguf").without_merges("shortest")
    known = set(tokenizer._backend.get_vocab(with_added_tokens=False)) - set(CONTROL)

    @cache
    def best(piece: str) -> tuple[str, ...]:
        """The fewest; of these the one whose first token is the longest, and so on."""
        if not piece:
            return ()
        ways = [
            (piece[:end], *best(piece[end:]))
            for end in range(1, len(piece) + 1)
            if piece[:end] in known
        ]
        return min(ways, key=lambda way: (len(way), [-len(token) for token in way]))

    for text in TEXTS:
        pieces = tokenizer._backend.pre_tokenizer.pre_tokenize_str(text)
        expected = itertools.chain.from_iterable(best(piece) for piece, _ in pieces)
        if "<tool>" not in text and "\t\t\t" not in text:
            token_ids = tokenizer.encode(text, add_special=False)
            assert [tokenizer.id_to_token(item) for item in token_ids] == [*expected]


@pytest.mark.parametrize("mode", MODES)
def test_text_never_becomes_bytes_or_control_tokens_by_spelling_them(mode):
    for make in (scored, raw):
        tokenizer = tokenizer_from_metadata(make(), "x.gguf").without_merges(mode)
        for text in ("<0x41>", *CONTROL, "<unk>"):
            token_ids = tokenizer.encode(text, add_special=False)
            assert tokenizer.token_to_id(text) not in token_ids


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_files_of_the_hub_too(mode, kind, tmp_path):
    path = save(KINDS[kind](), tmp_path)
    ours, usual = Tokenizer.load(path, mode), Tokenizer.load(path)

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.text(max_size=30))
    def check(text):
        assert ours.decode(ours.encode(text)) == usual.decode(usual.encode(text))

    check()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["metaspace", "word piece"])
def test_other_vocabularies_are_refused(mode, kind, tmp_path):
    path = save(KINDS[kind](), tmp_path)
    with pytest.raises(InvalidOption, match=f"tokenization is '{mode}'.*not plain BPE"):
        Tokenizer.load(path, mode)


def test_unknown_names_are_refused():
    with pytest.raises(InvalidOption, match=r"tokenization is 'shorter': did you mean shortest\?"):
        LLM("tiny", tokenization="shorter")  # pyright: ignore[reportArgumentType]


def test_the_work_grows_as_the_text():
    """One piece of a hundred thousand letters; quadratic work would take an hour."""
    tokenizer = tokenizer_from_metadata(byte_level("qwen2"), "x.gguf")
    for mode in MODES:
        start = time.process_time()
        tokenizer.without_merges(mode).encode("ab" * 50_000)
        assert time.process_time() - start < 30


def test_the_model_answers():
    for mode in MODES:
        with LLM("tiny", tokenization=mode) as llm:
            token_ids = llm.tokenizer.encode("def add(a, b):")
            assert llm.generate("def add(a, b):").prompt_token_ids == token_ids
