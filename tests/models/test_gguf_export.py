"""Any model written as GGUF gives the same tokens and answers; what cannot be said is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers_in_code
from gguf_files import (
    INT32,
    STRING,
    RawGguf,
    array,
    good_metadata,
    good_tensors,
    key,
    string,
    write_model,
)
from gguf_vocabularies import CONTROL, USER_DEFINED, VOCABULARIES, byte_level, scored
from random_texts import FIXED_TEXTS, random_texts
from text_models import PUBLISHED, published, write_checkpoint
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Tokenizer, LlamaTokenizer

from vivace import LLM, SamplingParams
from vivace.errors import BadFile, InvalidOption, UnsupportedModel
from vivace.models.config import Config
from vivace.models.formats.gguf import GgufFile
from vivace.models.gguf.export import export_gguf
from vivace.models.gguf.pre_tokenizer_names import find_pre_name
from vivace.models.gguf.pre_tokenizers import PRE_TOKENIZERS
from vivace.models.gguf.tokenizer import WHOLE_TOKENIZER, tokenizer_from_metadata
from vivace.models.gguf.tokenizer_keys import tokenizer_keys
from vivace.models.gguf.write import Storage, copy_gguf
from vivace.models.loading import load_model
from vivace.models.tokenizer import Tokenizer

TEXTS = [*FIXED_TEXTS, *random_texts(5, 100), "'llama 'the", "a <|user|> b<tool>> \t\t\tc"]
ROLES = {"bos_token": "<|begin|>", "eos_token": "<|im_end|>"}
CUT_ELSEWHERE = {"tekken", "gpt-4o"}  # llama.cpp takes letters outside ASCII and marks otherwise


def read(keys) -> Tokenizer:
    return tokenizer_from_metadata(keys, "x.gguf")


def assert_same(a: Tokenizer, b: Tokenizer) -> None:
    for text in TEXTS:
        for allow_special in (False, True):
            ids = a.encode(text, allow_special=allow_special)
            assert b.encode(text, allow_special=allow_special) == ids, text
            assert b.decode(ids, skip_special=False) == a.decode(ids, skip_special=False), text


# ---------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("name", VOCABULARIES)
def test_what_gguf_files_hold_is_written_back(name):
    metadata = VOCABULARIES[name]()
    tokenizer = read(metadata)
    keys = tokenizer_keys(tokenizer, tokenizer.vocab_size, None)
    assert WHOLE_TOKENIZER not in keys
    for name in ("model", "pre", "tokens", "token_type", "merges", "add_space_prefix"):
        name = f"tokenizer.ggml.{name}"
        assert keys.get(name) == metadata.get(name), name
    assert_same(tokenizer, read(keys))
    assert read(keys).eog_token_ids == tokenizer.eog_token_ids


def test_spaces_that_belong_to_control_tokens_are_told_by_a_name():
    tokenizer = read(scored() | {"general.name": "Phi-3 mini"})
    text = "a<|user|>  \nb"
    assert tokenizer.encode(text, allow_special=True) != read(scored()).encode(
        text, allow_special=True
    )
    keys = tokenizer_keys(tokenizer, tokenizer.vocab_size, None)
    assert (keys["general.name"], WHOLE_TOKENIZER in keys) == ("phi-3", False)
    assert_same(tokenizer, read(keys))


@pytest.mark.parametrize("pre", PUBLISHED)
def test_published_patterns_are_told(pre):
    tokenizer = Tokenizer(published(pre), ROLES)
    keys = tokenizer_keys(tokenizer, tokenizer.vocab_size + 3, None)
    assert keys["tokenizer.ggml.pre"] == pre
    assert (WHOLE_TOKENIZER in keys) == (pre in CUT_ELSEWHERE)
    assert keys["tokenizer.ggml.tokens"][-1] == f"[PAD{tokenizer.vocab_size + 2}]"
    assert keys["tokenizer.ggml.token_type"][-1] == gguf.TokenType.UNUSED
    if pre != "qwen2":  # of which texts are normalised
        assert_same(tokenizer, read(keys))
    assert read(keys).special_tokens == ROLES


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_name_is_told_from_its_own_patterns(pre):
    facts = PRE_TOKENIZERS[pre]
    found = find_pre_name(
        json.loads(facts.build("" if facts.is_raw else "ÿ").__getstate__()), facts.ignores_merges
    )
    assert found is not None
    other = PRE_TOKENIZERS[found]
    assert (other.patterns, other.ignores_merges) == (facts.patterns, facts.ignores_merges)


@pytest.mark.parametrize("legacy", [True, False])
def test_llama_tokenizers_of_transformers(legacy):
    """They put no space before one that begins a text: the whole tokenizer says so."""
    metadata = scored()
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair) for pair in read(metadata).to_state()["model"]["merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    theirs = LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=legacy)
    theirs.add_special_tokens({"additional_special_tokens": list(CONTROL)})
    theirs.add_tokens(list(USER_DEFINED))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = Tokenizer(theirs.backend_tokenizer, roles)
    keys = tokenizer_keys(tokenizer, tokenizer.vocab_size, None)
    assert (keys["tokenizer.ggml.model"], WHOLE_TOKENIZER in keys) == ("llama", True)
    assert_same(tokenizer, read(keys))
    del keys[WHOLE_TOKENIZER]
    assert read(keys).encode("Hello world") == tokenizer.encode("Hello world")
    assert read(keys).encode(" Hello") != tokenizer.encode(" Hello")


def test_gpt2_tokenizers_of_transformers():
    metadata = byte_level("gpt-2")
    tokens = metadata["tokenizer.ggml.tokens"][: -len(CONTROL + USER_DEFINED)]
    tokens.append("<|endoftext|>")
    merges: Any = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    theirs = GPT2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    roles = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    tokenizer = Tokenizer(theirs.backend_tokenizer, roles)
    keys = tokenizer_keys(tokenizer, tokenizer.vocab_size, None)
    assert (keys["tokenizer.ggml.pre"], keys["tokenizer.ggml.add_bos_token"]) == ("gpt-2", False)
    assert WHOLE_TOKENIZER not in keys
    assert_same(tokenizer, read(keys))


def test_a_name_that_cuts_otherwise_comes_with_the_whole_tokenizer():
    tokenizer = load_model("tiny").tokenizer
    with pytest.raises(UnsupportedModel, match="no name in GGUF: --pre NAME writes it"):
        tokenizer_keys(tokenizer, 4096, None)
    keys = tokenizer_keys(tokenizer, 4096, "smollm")
    assert_same(tokenizer, read(keys))
    assert read(keys).templates == tokenizer.templates
    assert read(keys).special_tokens == tokenizer.special_tokens
    del keys[WHOLE_TOKENIZER]
    assert read(keys).encode("'llama") != tokenizer.encode("'llama")


def test_what_stands_around_a_text_and_templates_are_kept():
    backend = published("gpt-2")
    begin, end = (backend.token_to_id(token) for token in ROLES.values())
    backend.post_processor = TemplateProcessing(
        single="<|begin|> $A <|im_end|>",
        special_tokens=[("<|begin|>", begin), ("<|im_end|>", end)],
    )
    templates = {"default": "{{ bos_token }}x", "tool_use": "y"}
    tokenizer = Tokenizer(backend, ROLES | {"pad_token": "<|unused_1|>"}, templates)
    other = read(tokenizer_keys(tokenizer, tokenizer.vocab_size, None))
    assert other.encode("a")[:1] + other.encode("a")[-1:] == [begin, end]
    assert other.templates == templates
    assert other.special_tokens == tokenizer.special_tokens


def lower_case() -> Backend:
    backend = published("gpt-2")
    backend.normalizer = normalizers.Lowercase()
    return backend


def prefixed() -> Backend:
    backend = published("gpt-2")
    backend.pre_tokenizer = ByteLevel(add_prefix_space=True)
    return backend


def ends_in_another() -> Backend:
    backend = published("gpt-2")
    user = backend.token_to_id("<|user|>")
    backend.post_processor = TemplateProcessing(
        single="$A <|user|>", special_tokens=[("<|user|>", user)]
    )
    return backend


def without_merges() -> Backend:
    backend = Backend(BPE({letter: i for i, letter in enumerate(ByteLevel.alphabet())}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return backend


def merged_by_some_pairs() -> Backend:
    state = read(scored()).to_state()
    state["post_processor"] = None
    state["model"]["merges"] = state["model"]["merges"][::2]
    return Backend.from_str(json.dumps(state))


REFUSALS = {
    "unigram": (tokenizers_in_code.metaspace, "is of kind Unigram"),
    "word piece": (tokenizers_in_code.word_piece, "is of kind WordPiece"),
    "no merges": (without_merges, "is of kind BPE"),
    "a pattern of its own": (tokenizers_in_code.byte_level, "--pre NAME"),
    "lower case": (lower_case, "--pre NAME"),
    "a space put first": (prefixed, "--pre NAME"),
    "very long tokens": (tokenizers_in_code.byte_fallback, "has 673 characters"),
    "some merges": (merged_by_some_pairs, "makes other tokens of"),
    "another token last": (ends_in_another, "around a text"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_tokenizers_that_gguf_cannot_say_are_refused(name):
    make, message = REFUSALS[name]
    tokenizer = Tokenizer(make(), ROLES)
    with pytest.raises(UnsupportedModel, match=message) as caught:
        tokenizer_keys(tokenizer, tokenizer.vocab_size, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "pre", "message"),
    [
        (tokenizers_in_code.byte_level, "smolm", "did you mean smollm"),
        (tokenizers_in_code.byte_level, "gemma4", "not known"),
        (lambda: Backend.from_str(read(scored()).to_json()), "gpt-2", "has no place"),
    ],
)
def test_names_that_do_not_fit_are_refused(make, pre, message):
    tokenizer = Tokenizer(make(), ROLES)
    with pytest.raises(InvalidOption, match=message):
        tokenizer_keys(tokenizer, tokenizer.vocab_size, pre)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a tokenizer"),
        (1, "expected a string"),
        ("x" * (2**27 + 1), "is longer than"),
    ],
)
def test_a_damaged_whole_tokenizer_is_refused(text, message):
    keys = tokenizer_keys(load_model("tiny").tokenizer, 4096, "smollm")
    with pytest.raises(BadFile, match=message):
        read(keys | {WHOLE_TOKENIZER: text})


def test_a_whole_tokenizer_of_another_vocabulary_is_refused():
    keys = tokenizer_keys(load_model("tiny").tokenizer, 4096, "smollm")
    with pytest.raises(BadFile, match=r"as token \d+ but tokenizer.ggml.tokens"):
        read(keys | {WHOLE_TOKENIZER: published("gpt-2").to_str()})
    with pytest.raises(BadFile, match=r"as token 4000 but tokenizer\.ggml\.tokens None"):
        read(keys | {f"tokenizer.ggml.{name}": keys[f"tokenizer.ggml.{name}"][:4000]
                     for name in ("tokens", "token_type")})  # fmt: skip


# ---------------------------------------------------------------- models


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = write_checkpoint(tmp_path_factory.mktemp("model"), published("gpt-2"))
    recommended = {"temperature": 0.0, "top_k": 0, "top_p": 0.5, "eos_token_id": [5, 6]}
    (path / "generation_config.json").write_text(json.dumps(recommended))
    return path


def answers(location, **options) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=12)
    with LLM(str(location), plan=None, weights="float32", **options) as llm:
        prompts = ("Hello world", "Hello 123 'tis", "日本語")
        return [llm.generate(prompt, params).choices[0].token_ids for prompt in prompts]


def test_an_exported_model_answers_the_same(source, tmp_path):
    model = load_model(source)
    export_gguf(model, tmp_path / "model.gguf", None, None)
    assert {info.type.name for info in GgufFile(tmp_path / "model.gguf").tensors.values()} == {
        "F32"
    }
    kind = gguf.GGUFValueType
    types = {key: types for key, (_, types) in fields(tmp_path / "model.gguf").items()}
    assert types["tokenizer.ggml.token_type"][:2] == [kind.ARRAY, kind.INT32]  # or it is refused
    assert types["tokenizer.ggml.eos_token_id"] == [kind.UINT32]
    read = load_model(tmp_path / "model.gguf")
    assert read.eos_token_ids >= model.eos_token_ids
    with LLM(str(source)) as ours, LLM(str(tmp_path / "model.gguf")) as other:
        assert other.default_params() == ours.default_params()
    assert answers(tmp_path / "model.gguf") == answers(source)


def test_tokens_that_end_an_answer_need_a_place(source, tmp_path):
    recommended = Config({"eos_token_id": [1, 5, 6, 7]}, "generation_config.json")
    model = replace(load_model(source), generation_config=recommended)
    with pytest.raises(UnsupportedModel, match="4 tokens that end an answer have no place"):
        export_gguf(model, tmp_path / "model.gguf", None, None)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_tokenizer(source, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((source / name).read_bytes())
    export_gguf(load_model(bare), tmp_path / "bare.gguf", Storage.F16, None)
    assert not load_model(tmp_path / "bare.gguf").has_tokenizer
    with pytest.raises(InvalidOption, match="the model has none"):
        export_gguf(load_model(bare), tmp_path / "bare.gguf", None, "gpt-2")


@pytest.mark.parametrize("name", ["model.bin", "model", "model-00001-of-00002.gguf", ".gguf"])
def test_names_of_files_that_are_no_models_are_refused(name, source, tmp_path):
    with pytest.raises(InvalidOption, match="expected a name that ends in"):
        export_gguf(load_model(source), tmp_path / name, None, None)


# ---------------------------------------------------------------- copies


def fields(path) -> dict[str, tuple[object, list]]:
    reader = gguf.GGUFReader(path)
    return {
        key: (field.contents(), field.types)
        for key, field in reader.fields.items()
        if not key.startswith(("GGUF.", "split."))
    }


def more_metadata():
    kind = gguf.GGUFValueType
    return good_metadata() | {
        "some.wide": (2**40, kind.UINT64, None),
        "some.small": (-3, kind.INT8, None),
        "some.double": (0.1, kind.FLOAT64, None),
        "some.flags": ([True, False], kind.ARRAY, kind.BOOL),
        "some.shorts": ([1, 2], kind.ARRAY, kind.INT16),
    }


@pytest.mark.parametrize("options", [{}, {"split_max_tensors": 5}])
def test_a_file_is_copied_as_it_is(options, tmp_path):
    write_model(tmp_path / "one.gguf", more_metadata(), good_tensors(), **options)
    (first,) = (
        path for path in tmp_path.iterdir() if "of" not in path.name or "00001" in path.name
    )
    export_gguf(load_model(first), tmp_path / "copy.gguf", None, None)
    assert fields(tmp_path / "copy.gguf") == fields(first)
    before, after = GgufFile(first), GgufFile(tmp_path / "copy.gguf")
    assert list(after.tensors) == list(before.tensors)
    for name, info in before.tensors.items():
        assert (after.tensors[name].type, after.tensors[name].shape) == (info.type, info.shape)
        assert np.array_equal(after.raw(name), before.raw(name))
    with pytest.raises(InvalidOption, match="is copied"):
        export_gguf(load_model(first), tmp_path / "copy.gguf", None, "gpt-2")


def test_the_alignment_is_kept(tmp_path):
    metadata = good_metadata()
    metadata["general.alignment"] = (128, gguf.GGUFValueType.UINT32, None)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_custom_alignment(128)
    for name, (value, type, of) in metadata.items():
        if name not in ("general.architecture", "general.alignment"):
            writer.add_key_value(name, value, type, of)
    for name, (data, type) in good_tensors().items():
        writer.add_tensor(name, data, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    export_gguf(load_model(tmp_path / "model.gguf"), tmp_path / "copy.gguf", None, None)
    assert (tmp_path / "copy.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()


@pytest.mark.parametrize("storage", Storage)
def test_a_copy_can_be_stored_otherwise(storage, tmp_path):
    write_model(tmp_path / "one.gguf", more_metadata(), good_tensors())
    export_gguf(load_model(tmp_path / "one.gguf"), tmp_path / "copy.gguf", storage, None)
    before, after = GgufFile(tmp_path / "one.gguf"), GgufFile(tmp_path / "copy.gguf")
    assert after.metadata["general.file_type"] == storage.file_type
    for name, info in before.tensors.items():
        own, new = (np.asarray(file.array(name), np.float32) for file in (before, after))
        assert after.tensors[name].shape == info.shape
        assert after.tensors[name].type.name == ("F32" if own.ndim == 1 else storage.upper())
        error = {"f32": 0, "f16": 1e-3, "bf16": 4e-3, "q8_0": 6e-3}[storage]
        assert np.abs(new - own).max() <= error * max(1.0, np.abs(own).max())


def test_a_file_with_an_empty_list_is_not_copied(tmp_path):
    keys = [key("general.architecture", STRING, string("llama")), array("a", INT32, b"", 0)]
    (tmp_path / "raw.gguf").write_bytes(RawGguf(keys=keys).bytes())
    with pytest.raises(UnsupportedModel, match="metadata key 'a' is an empty list"):
        copy_gguf(tmp_path / "copy.gguf", GgufFile(tmp_path / "raw.gguf"), None)
    assert not (tmp_path / "copy.gguf").exists()
