"""Vocabularies of GGUF files give llama.cpp's tokens; damaged ones are refused by key."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_vocabularies import CONTROL, TEXT, VOCABULARIES, byte_level, raw, scored
from random_texts import FIXED_TEXTS, random_texts
from tokenizers import Regex
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from transformers import LlamaTokenizer

from vivace.errors import BadFile, UnsupportedModel
from vivace.models.gguf.pre_tokenizers import PRE_TOKENIZERS
from vivace.models.gguf.tokenizer import tokenizer_from_metadata

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "tokens.json").read_text("utf-8"))
SPELLED_PRE = {name: case["tokens"] for case in GOLDEN["pre"].values() for name in case["names"]}


def spelled(token_ids: list[int]) -> str:
    return " ".join(map(str, token_ids))


def make(metadata: dict[str, Any]):
    return tokenizer_from_metadata(metadata, "x.gguf")


@pytest.fixture(scope="module", params=VOCABULARIES)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(kind):
    return make(VOCABULARIES[kind]())


# ---------------------------------------------------------------- as llama.cpp


def test_plain_text_becomes_the_tokens_of_llama_cpp(kind, tokenizer):
    tokens = GOLDEN["kinds"][kind]["plain"]
    for text, expected in zip(GOLDEN["texts"], tokens, strict=True):
        assert spelled(tokenizer.encode(text)) == expected, text


def test_tags_become_the_tokens_of_llama_cpp(kind, tokenizer):
    tokens = GOLDEN["kinds"][kind]["parsed"]
    for text, expected in zip(GOLDEN["texts"], tokens, strict=True):
        begin = f"{tokenizer.bos_token_id} "
        if expected.startswith(begin * 2):  # there it is written twice
            expected = expected.removeprefix(begin)
        assert spelled(tokenizer.encode(text, allow_special=True)) == expected, text


@pytest.mark.parametrize("pre", SPELLED_PRE)
def test_each_pre_tokenizer_cuts_as_llama_cpp(pre):
    tokenizer = make(byte_level(pre))
    for text, expected in zip(GOLDEN["texts"], SPELLED_PRE[pre], strict=True):
        assert spelled(tokenizer.encode(text)) == expected, text


def test_every_pre_tokenizer_is_compared():
    assert SPELLED_PRE.keys() == {
        name for name, facts in PRE_TOKENIZERS.items() if not facts.is_raw
    }
    assert len(GOLDEN["pre"]) > 20, "the texts tell too few of them apart"


def test_tokens_that_end_an_answer_are_those_of_llama_cpp(kind, tokenizer):
    assert sorted(tokenizer.eog_token_ids) == GOLDEN["kinds"][kind]["end"]


# ---------------------------------------------------------------- as transformers and tokenizers


def test_scored_vocabularies_are_as_transformers_reads_them():
    """The same vocabulary and merges, in the tokenizer that such models are published with."""
    metadata = scored()
    ours = make(metadata)
    tokens = metadata["tokenizer.ggml.tokens"]
    state = json.loads(ours._backend.to_str())["model"]
    theirs = LlamaTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(pair) for pair in state["merges"]],
        legacy=True,
    )
    for text in [*FIXED_TEXTS, *random_texts(3, 200)]:
        text = text.lstrip(" ▁")  # theirs puts no space before one
        if any(tag in text for tag in ("<unk>", "<s>", "<0x", "\t\t\t")) or not text:
            continue
        assert ours.encode(text) == [1, *theirs.encode(text, add_special_tokens=False)], text


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe"])
def test_byte_level_vocabularies_are_as_published_patterns_cut(pre):
    """Where a text has no character on which llama.cpp's pattern and the published one differ."""
    published = {
        "gpt-2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
    metadata = byte_level(pre)
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    theirs = Backend(BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    theirs.pre_tokenizer = Sequence(
        [
            Split(Regex(published[pre]), "isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    ours = make(metadata)
    for text in TEXT.splitlines(keepends=True):
        if "<tool>" not in text and "\t\t\t" not in text:
            assert ours.encode(text, add_special=False) == theirs.encode(text).ids


# ---------------------------------------------------------------- special tokens and ends


def test_control_tokens_in_text_stay_text(tokenizer):
    for tag in CONTROL:
        assert tokenizer.token_to_id(tag) in tokenizer.encode(f"a{tag}b", allow_special=True)
        assert tokenizer.special_ids.isdisjoint(tokenizer.encode(f"a{tag}b", add_special=False))


def test_control_tokens_that_merges_could_make_stay_text():
    metadata = scored()
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    for index, token in enumerate(("<e", "<en", "<end", "<end>")):
        tokens.append(token)
        kinds.append(3 if token == "<end>" else 1)
        metadata["tokenizer.ggml.scores"].append(float(index + 1))
    for token in ("<", "e", "n", "d", ">"):
        assert token in tokens
    tokenizer = make(metadata)
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode("x<end>", add_special=False))
    assert "<end" in map(tokenizer.id_to_token, tokenizer.encode("x<end>"))


def test_user_defined_tokens_are_found_in_any_text(tokenizer):
    for tag in ("<tool>", "<tool>>", "\t\t\t"):
        assert tokenizer.token_to_id(tag) in tokenizer.encode(f"a{tag}b")


@pytest.mark.parametrize("begins", [None, True, False])
@pytest.mark.parametrize("ends", [None, True, False])
def test_what_stands_around_a_text(begins, ends):
    for make_metadata, begins_unasked in ((scored, True), (lambda: byte_level("qwen2"), False)):
        metadata = make_metadata()
        if begins is not None:
            metadata["tokenizer.ggml.add_bos_token"] = begins
        if ends is not None:
            metadata["tokenizer.ggml.add_eos_token"] = ends
        tokenizer = make(metadata)
        token_ids = tokenizer.encode("x")
        is_begun = begins_unasked if begins is None else begins
        assert (token_ids[0] == tokenizer.bos_token_id) == is_begun
        assert (token_ids[-1] == tokenizer.eos_token_id) == bool(ends)


def test_there_is_one_first_token(tokenizer):
    begin = tokenizer.id_to_token(tokenizer.bos_token_id)
    for text in (f"{begin}x", "x", ""):
        assert tokenizer.encode(text, allow_special=True).count(tokenizer.bos_token_id) == 1


def test_spaces_behind_control_tokens_of_phi_3_belong_to_them():
    metadata = scored() | {"general.name": "Phi-3.5 mini"}
    tokenizer = make(metadata)
    token_ids = tokenizer.encode("<|user|> \n x<s> x", False, allow_special=True)
    assert "".join(map(str, map(tokenizer.id_to_token, token_ids))) == "<|user|>▁x<s>▁▁x"


def test_roles_reach_templates():
    metadata = byte_level("qwen2") | {
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "tools",
    }
    tokenizer = make(metadata)
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.render_chat(messages) == "<|begin|>x<|im_end|>"
    assert tokenizer.render_chat(messages, tools=[{}]) == "tools"


def test_no_template_no_chat():
    assert not make(scored()).has_template


# ---------------------------------------------------------------- text of tokens


def joined(tokenizer, token_ids, before=(), skip_special=True):
    stream = tokenizer.detokenizer(before, skip_special)
    return "".join([*(stream.add(item) for item in token_ids), stream.finish()])


def test_text_comes_back(tokenizer):
    """Behind a user-defined token a scored vocabulary puts a space, as llama.cpp does."""
    for text in [*FIXED_TEXTS, *random_texts(11, 300, CONTROL)]:
        text = re.sub("\t{3,}", "\t", text)
        plain = text.replace("▁", " ") if tokenizer.token_to_id("▁") is not None else text
        assert tokenizer.decode(tokenizer.encode(text)) == plain
        assert joined(tokenizer, tokenizer.encode(text)) == plain


def test_streams_never_split_a_character(tokenizer):
    token_ids = tokenizer.encode("🙂 東京 é 🙃", add_special=False)
    stream = tokenizer.detokenizer()
    pieces = [stream.add(item) for item in token_ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces, "no token ends inside a character: the test shows nothing"
    assert joined(tokenizer, token_ids[:2] + token_ids[3:4]).endswith("\ufffd")


def test_a_damaged_character_does_not_harm_its_neighbours():
    """The library makes every byte of a run of bytes U+FFFD if one is wrong."""
    tokenizer = make(scored())
    byte = tokenizer.token_to_id("<0xF0>")
    token_ids = [*tokenizer.encode("日", add_special=False), byte]
    assert byte is not None
    assert tokenizer.decode(token_ids) == "日\ufffd"


def test_a_continued_text_keeps_its_space():
    tokenizer = make(scored())
    token_ids = tokenizer.encode("The quick fox", add_special=False)
    for cut in range(1, len(token_ids)):
        whole, start = tokenizer.decode(token_ids), tokenizer.decode(token_ids[:cut])
        assert start + joined(tokenizer, token_ids[cut:], token_ids[:cut]) == whole


def test_unknown_characters_without_byte_tokens():
    metadata = scored(has_bytes=False)
    tokenizer = make(metadata)
    assert tokenizer.encode("日本", add_special=False)[-1] == 0
    damaged = metadata | {"tokenizer.ggml.tokens": list(metadata["tokenizer.ggml.tokens"])}
    damaged["tokenizer.ggml.tokens"][-1] = "<0x41>"
    with pytest.raises(BadFile, match="1 of the 256 byte tokens"):
        make(damaged)


def test_bytes_without_letters_are_left_out_and_join_nothing():
    metadata = byte_level("gpt-2")
    tokens = metadata["tokenizer.ggml.tokens"]
    tokens[tokens.index("Ā")] = "[gone]"  # the letter of byte 0
    tokenizer = make(metadata)
    parts = tokenizer.encode("Th", add_special=False) + tokenizer.encode("e", add_special=False)
    assert tokenizer.encode("Th\0e", add_special=False) == parts
    assert tokenizer.encode("The", add_special=False) != parts


# ---------------------------------------------------------------- damaged metadata


def test_other_kinds_are_refused_by_name():
    for kind in ("bert", "t5", "rwkv", "plamo2", "none", "no_vocab", ""):
        with pytest.raises(UnsupportedModel, match=r"x\.gguf.*supported are gpt2"):
            make(scored() | {"tokenizer.ggml.model": kind})


def test_unknown_pre_tokenizers_name_the_nearest():
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.ggml\.pre is 'qwen3'.*qwen2"):
        make(byte_level("qwen3"))


def changed(key: str, change):
    """A damage: the value of a key after `change`, which may alter it in place."""

    def damage(metadata: dict[str, Any]) -> None:
        name = key if "." in key else f"tokenizer.ggml.{key}"
        value = metadata.get(name)
        copy = list(value) if isinstance(value, list) else value
        result = change(copy)
        metadata[name] = copy if result is None else result

    return damage


def removed(key: str):
    return lambda metadata: metadata.pop(f"tokenizer.ggml.{key}")


def surrogate(values):
    values[3] = "\ud800"


DAMAGES: dict[str, tuple[Any, Any, str]] = {
    "no kind": (scored, removed("model"), "tokenizer.ggml.model"),
    "kind of a wrong type": (scored, changed("model", lambda _: 3), "tokenizer.ggml.model"),
    "pre of a wrong type": (
        lambda: byte_level("qwen2"),
        changed("pre", lambda _: ["a"]),
        "ggml.pre",
    ),
    "no tokens": (scored, removed("tokens"), "tokens is missing"),
    "tokens are a string": (scored, changed("tokens", lambda _: "abc"), "tokens is not a list"),
    "tokens are numbers": (scored, changed("tokens", lambda _: [1, 2]), "tokens is not a list"),
    "tokens are bytes": (scored, changed("tokens", lambda _: [b"a"]), "tokens is not a list"),
    "empty vocabulary": (scored, changed("tokens", lambda _: []), "tokens has 0 entries"),
    "token twice": (scored, changed("tokens", lambda v: v.__setitem__(-1, v[-2])), "twice"),
    "not UTF-8": (scored, changed("tokens", surrogate), "tokens has an entry that is not UTF-8"),
    "no scores": (scored, removed("scores"), "scores is missing"),
    "too few scores": (scored, changed("scores", lambda v: v[:-1]), "scores has .* entries but"),
    "too many scores": (
        scored,
        changed("scores", lambda v: [*v, 0.0]),
        "scores has .* entries",
    ),
    "scores are texts": (
        scored,
        changed("scores", lambda v: ["a"] * len(v)),
        "scores is not a list",
    ),
    "a score is NaN": (scored, changed("scores", lambda v: v.__setitem__(9, math.nan)), "finite"),
    "a score is infinite": (
        scored,
        changed("scores", lambda v: v.__setitem__(9, math.inf)),
        "finite",
    ),
    "nested scores": (
        scored,
        changed("scores", lambda v: [[x] for x in v]),
        "scores is not a list",
    ),
    "ragged scores": (scored, changed("scores", lambda v: [*v[1:], [1]]), "scores is not a list"),
    "scores are a number": (scored, changed("scores", lambda _: 1.0), "scores is not a list"),
    "too few types": (scored, changed("token_type", lambda v: v[:-1]), "token_type has"),
    "types are floats": (
        scored,
        changed("token_type", lambda v: np.asarray(v, np.float32)),
        "token_type is not a list of whole numbers",
    ),
    "byte token misspelled": (
        scored,
        changed("token_type", lambda v: v.__setitem__(-1, 6)),
        r"tokens\[\d+\] is '\\t\\t\\t': expected a byte",
    ),
    "a byte token is gone": (
        scored,
        changed("tokens", lambda v: v.__setitem__(v.index("<0x41>"), "<0x4>")),
        "255 of the 256",
    ),
    "a letter is gone": (
        lambda: byte_level("qwen2"),
        changed("tokens", lambda v: v.__setitem__(v.index("A"), "[A]")),
        "no token 'A' for byte 0x41",
    ),
    "a very long token": (
        scored,
        changed("tokens", lambda v: v.__setitem__(300, "a" * 1000)),
        r"tokens\[300\] has 1000 characters",
    ),
    "no merges": (lambda: byte_level("qwen2"), removed("merges"), "merges is missing"),
    "a merge without a space": (
        lambda: byte_level("qwen2"),
        changed("merges", lambda v: v.__setitem__(2, "ab")),
        r"merges\[2\] is 'ab'",
    ),
    "a merge of one text": (
        lambda: byte_level("qwen2"),
        changed("merges", lambda v: v.__setitem__(2, "ab ")),
        r"merges\[2\]",
    ),
    "an empty merge": (
        lambda: byte_level("qwen2"),
        changed("merges", lambda v: v.__setitem__(2, "")),
        r"merges\[2\]",
    ),
    "a merge of no tokens": (
        lambda: byte_level("qwen2"),
        changed("merges", lambda v: v.append("zzzq qzzz")),
        "merges joins 'zzzq' and 'qzzz'",
    ),
    "a merge that makes no token": (
        lambda: byte_level("qwen2"),
        changed("merges", lambda v: v.append("q ÿ")),
        "merges joins 'q' and 'ÿ'",
    ),
    "first token out of range": (scored, changed("bos_token_id", lambda _: 10**6), "bos_token_id"),
    "negative id": (scored, changed("eos_token_id", lambda _: -1), "eos_token_id"),
    "id is a text": (scored, changed("padding_token_id", lambda _: "1"), "padding_token_id"),
    "id is true": (scored, changed("eot_token_id", lambda _: True), "eot_token_id"),
    "older name out of range": (
        scored,
        changed("prefix_token_id", lambda _: 2**31),
        "prefix_token",
    ),
    "flag is a number": (scored, changed("add_bos_token", lambda _: 1), "add_bos_token"),
    "space flag is a text": (
        scored,
        changed("add_space_prefix", lambda _: "no"),
        "add_space_prefix",
    ),
    "no first token to add": (
        lambda: {k: v for k, v in byte_level("qwen2").items() if "bos_token_id" not in k},
        changed("add_bos_token", lambda _: True),
        "bos_token_id",
    ),
    "no last token to add": (
        lambda: {k: v for k, v in byte_level("qwen2").items() if "eos_token_id" not in k},
        changed("add_eos_token", lambda _: True),
        "eos_token_id",
    ),
    "template is a number": (
        scored,
        changed("tokenizer.chat_template", lambda _: 1),
        "chat_template",
    ),
    "template is too long": (
        scored,
        changed("tokenizer.chat_template", lambda _: "x" * 2**21),
        "chat template 'default' is longer",
    ),
    "template names are a text": (
        scored,
        changed("tokenizer.chat_templates", lambda _: "rag"),
        "chat_templates",
    ),
    "a named template is missing": (
        scored,
        changed("tokenizer.chat_templates", lambda _: ["rag"]),
        "chat_template.rag",
    ),
    "raw without a byte": (
        raw,
        changed("tokens", lambda v: v.__setitem__(v.index("<0x00>"), "<0>")),
        "255 of the 256",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_metadata_is_refused(name):
    make_metadata, damage, message = DAMAGES[name]
    metadata = make_metadata()
    damage(metadata)
    with pytest.raises(BadFile, match=message) as caught:
        make(metadata)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("x.gguf")


def test_lists_of_numbers_may_be_arrays():
    metadata = scored()
    metadata["tokenizer.ggml.scores"] = np.asarray(metadata["tokenizer.ggml.scores"], np.float32)
    metadata["tokenizer.ggml.token_type"] = np.asarray(
        metadata["tokenizer.ggml.token_type"], np.int32
    )
    assert make(metadata).encode(TEXT) == make(scored()).encode(TEXT)


def test_tokens_without_text_get_one():
    metadata = scored()
    metadata["tokenizer.ggml.tokens"][-1] = ""
    assert make(metadata).id_to_token(len(metadata["tokenizer.ggml.tokens"]) - 1) is not None


def test_repeated_merges_count_once():
    metadata = byte_level("qwen2")
    expected = make(metadata).encode(TEXT)
    metadata["tokenizer.ggml.merges"] += metadata["tokenizer.ggml.merges"][::-1]
    assert make(metadata).encode(TEXT) == expected


ODD: list[Any] = [None, 0, -1, 2**63, math.nan, "", "<s>", [], ["a"], [1], [None], {}, True, b"x"]
ODD += [np.zeros(3), np.zeros((2, 2)), ["\ud800"], [["a"]], "x" * 10_000]


def damaged(random_: random.Random) -> dict[str, Any]:
    """Metadata of some kind with a few wrong, missing, moved or repeated values."""
    metadata = dict(random_.choice([*VOCABULARIES.values(), lambda: scored(has_bytes=False)])())
    keys = [*metadata, "tokenizer.chat_template", "tokenizer.ggml.eot_token_id", "general.name"]
    for _ in range(random_.randrange(1, 4)):
        key = random_.choice(keys)
        values = metadata.get(key)
        if not isinstance(values, list) or not values or random_.random() < 0.2:
            metadata[key] = random_.choice(ODD)
            continue
        at, other = random_.randrange(len(values)), random_.randrange(len(values))
        changes = ([], [random_.choice(ODD)], [values[other]], [values[at], values[other]])
        metadata[key] = [*values[:at], *random_.choice(changes), *values[at + 1 :]]
    return metadata


def test_damaged_metadata_is_refused_or_harmless():
    outcomes = []
    for seed in range(200):
        try:
            tokenizer = make(damaged(random.Random(seed)))
        except (BadFile, UnsupportedModel) as error:
            outcomes.append(str(error))
            continue
        outcomes.append("read")
        around = {tokenizer.bos_token_id, tokenizer.eos_token_id}
        for text in FIXED_TEXTS:
            assert isinstance(tokenizer.decode(tokenizer.encode(text, allow_special=True)), str)
            assert tokenizer._control_ids.isdisjoint(set(tokenizer.encode(text)) - around), seed
    assert not [message for message in outcomes if "\n" in message]
    assert 20 < outcomes.count("read") < 180
