"""Spans of tokens are in order, cover the text, and spell whole tokens."""

from __future__ import annotations

import itertools

import pytest
from gguf_vocabularies import CONTROL, VOCABULARIES
from hypothesis import given, settings
from hypothesis import strategies as st
from random_texts import FIXED_TEXTS, random_texts
from tokenizers import normalizers
from tokenizers_in_code import KINDS, SPECIALS, byte_level, save

from vivace.models.gguf.tokenizer import tokenizer_from_metadata
from vivace.models.tokenizer import Tokenizer

TEXTS = [*FIXED_TEXTS, *random_texts(9, 100, [*CONTROL, *SPECIALS])]
NORMALIZERS = {
    "NFC": normalizers.NFC(),
    "NFD": normalizers.NFD(),
    "NFKC": normalizers.NFKC(),
    "NFKD": normalizers.NFKD(),
    "lower case without accents": normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    ),
    "strip": normalizers.Strip(),
    "drop": normalizers.Replace("x", ""),
}


def _normalizing(name, path):
    backend = byte_level()
    backend.normalizer = NORMALIZERS[name]
    return Tokenizer.load(save(backend, path))


def _of_gguf(case):
    if case in VOCABULARIES:
        return tokenizer_from_metadata(VOCABULARIES[case](), "x.gguf")
    kind = "scored" if case.startswith("scored") else "byte level"
    usual = tokenizer_from_metadata(VOCABULARIES[kind](), "x.gguf")
    return usual.without_merges(case.split(", ")[-1])


CASES = [*KINDS, *VOCABULARIES, *NORMALIZERS, "greedy", "shortest", "scored, greedy"]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(case, tmp_path_factory):
    path = tmp_path_factory.mktemp("spans")
    if case in KINDS:
        return Tokenizer.load(save(KINDS[case](), path))
    if case in NORMALIZERS:
        return _normalizing(case, path)
    return _of_gguf(case)


@pytest.mark.parametrize("allow_special", [False, True])
def test_spans_are_in_order_and_cover_the_text(tokenizer, allow_special):
    def check(text):
        rows = tokenizer.encode_with_offsets(text, True, allow_special)
        assert [row.token_id for row in rows] == tokenizer.encode(text, True, allow_special)
        assert all(0 <= row.begin <= row.end <= len(text) for row in rows)
        for before, after in itertools.pairwise(rows):
            assert before.begin <= after.begin
            assert before.end <= after.end
        covered = {at for row in rows for at in range(row.begin, row.end)}
        if any(row.begin < row.end for row in rows):
            assert covered == set(range(len(text)))

    for text in TEXTS:
        check(text)
    settings(max_examples=100, deadline=None, derandomize=True)(
        given(st.text(max_size=30))(check)
    )()


@pytest.mark.parametrize("kind", [*VOCABULARIES, "greedy", "scored, greedy"])
def test_tokens_of_whole_characters_are_spelled_by_their_spans(kind):
    tokenizer = _of_gguf(kind)
    before = tokenizer.encode("a", add_special=False)[-1:]
    has_signs = tokenizer.token_to_id("▁") is not None
    num_checked = 0
    for text in TEXTS:
        rows = tokenizer.encode_with_offsets(text)
        for place, (token_id, begin, end) in enumerate(rows):
            near = [*rows[max(0, place - 4) : place], *rows[place + 1 : place + 5]]
            if begin == end or any(row.begin < end and begin < row.end for row in near):
                continue
            stream = tokenizer.detokenizer(before, skip_special=False)
            spelled = stream.add(token_id) + stream.finish()
            num_checked += 1
            # "▁" stands for a space, also for one put in front, which no character stands for.
            shown = text[begin:end].replace("▁", " ") if has_signs else text[begin:end]
            assert shown == spelled or (f" {shown}" == spelled and has_signs)
    assert num_checked > 1000


def test_tokens_of_a_character_in_parts_span_it_all():
    tokenizer = tokenizer_from_metadata(VOCABULARIES["byte level"](), "x.gguf")
    spans = [row[1:] for row in tokenizer.encode_with_offsets("a🧪b", add_special=False)]
    assert spans[0] == (0, 1)
    assert spans[-1] == (2, 3)
    assert len(spans) > 3
    assert set(spans[1:-1]) == {(1, 2)}


def test_added_tokens_have_empty_spans():
    metadata = VOCABULARIES["scored"]() | {"tokenizer.ggml.add_eos_token": True}
    tokenizer = tokenizer_from_metadata(metadata, "x.gguf")
    rows = tokenizer.encode_with_offsets("日x")
    named = [(tokenizer.id_to_token(row.token_id), row.begin, row.end) for row in rows]
    assert named[:2] == [("<s>", 0, 0), ("▁", 0, 0)]
    assert named[-2:] == [("x", 1, 2), ("</s>", 2, 2)]


def test_a_joined_character_keeps_both_of_its_parts(tmp_path):
    tokenizer = _normalizing("NFC", tmp_path)
    rows = tokenizer.encode_with_offsets("e\u0301e\u0301x", add_special=False)
    assert [row[1:] for row in rows] == [(0, 2), (2, 4), (4, 5)]


def test_special_tokens_in_a_text(tmp_path):
    tokenizer = Tokenizer.load(save(byte_level(), tmp_path))
    rows = tokenizer.encode_with_offsets("<|begin|>x<|end|>", allow_special=True)
    assert [row[1:] for row in rows] == [(0, 9), (9, 10), (10, 17)]
    assert rows[0].token_id == tokenizer.bos_token_id
