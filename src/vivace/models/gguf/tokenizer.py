"""A tokenizer from a GGUF file's metadata, which gives llama.cpp's tokens.

A GGUF file means what it means in the program it was made for. Where llama.cpp and the tokenizer
that a model was published with differ, as in Unicode normalisation, llama.cpp is followed. These
differ from it on purpose: control tokens are never made of plain text, whatever merges would allow;
the first token is never there twice; a byte-level vocabulary that names no first or last token has
none; a token of such a vocabulary that is not written in the letters for bytes spells itself; a
whole tokenizer that a file holds is used in place of what the other keys say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from vivace.errors import BadFile, UnsupportedModel
from vivace.models.config import Config, show
from vivace.models.detokenizer import Pieces, bytes_of_letters
from vivace.models.gguf.pre_tokenizers import PreTokenizerFacts, find_pre_tokenizer
from vivace.models.gguf.vocabulary import TokenType, Vocabulary, read_vocabulary
from vivace.models.templates import check_templates
from vivace.models.tokenizer import Tokenizer
from vivace.models.tokenizer_files import MAX_TOKENIZER_BYTES, guarded

__all__ = ["WHOLE_TOKENIZER", "tokenizer_from_metadata"]

WHOLE_TOKENIZER = "tokenizer.huggingface.json"
MAX_SCORED_CHARACTERS = 2**22  # in a vocabulary whose merges follow from its scores
MAX_SCORED_LENGTH = 512  # characters of a token there
_SPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_KINDS = "gpt2 (byte-level), llama (SentencePiece with scores) and gemma4"
_DEFAULT_IDS = {"unk": 0, "bos": 1, "eos": 2}  # of `llama` vocabularies


def tokenizer_from_metadata(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """The tokenizer that the keys `tokenizer.*` describe; `source` names the file in messages.

    Lists of numbers may be arrays. Raises `BadFile`, `UnsupportedModel`.
    """
    config = Config(metadata, source)
    if WHOLE_TOKENIZER in metadata:
        return _whole(config)
    kind = config.text("tokenizer.ggml.model")
    if kind == "llama":
        vocabulary, backend = _scored(config)
        adds_bos, drops_space = True, config.boolean("tokenizer.ggml.add_space_prefix", True)
    elif kind in ("gpt2", "gemma4"):
        name = kind if kind == "gemma4" else config.text("tokenizer.ggml.pre", "default")
        facts = find_pre_tokenizer(name, source)
        vocabulary = read_vocabulary(metadata, source, needed="merges")
        backend = _merged(vocabulary, facts)
        adds_bos, drops_space = facts.adds_bos, False
    else:
        raise UnsupportedModel(
            f"{source}: tokenizer.ggml.model is {show(kind)}: supported are {_KINDS}"
        )
    _add_tokens(backend, vocabulary, config)
    begins = None if kind == "gemma4" else config.boolean("tokenizer.ggml.add_bos_token", None)
    _add_ends(backend, vocabulary, config, adds_bos if begins is None else begins)
    return Tokenizer(
        backend,
        _special_tokens(vocabulary),
        _templates(config),
        pieces=Pieces(_token_bytes(vocabulary, backend), drops_space),
        eog_token_ids=vocabulary.end_ids,
    )


def _whole(config: Config) -> Tokenizer:
    """The tokenizer.json in the metadata, whose tokens must be those of the other keys."""
    text, source = config.text(WHOLE_TOKENIZER), f"{config.source}: {WHOLE_TOKENIZER}"
    if len(text.encode()) > MAX_TOKENIZER_BYTES:
        raise BadFile(f"{source} is longer than {MAX_TOKENIZER_BYTES} bytes")
    backend = guarded(source, lambda: Backend.from_str(text))
    vocabulary = read_vocabulary(config.values, config.source, needed="tokens")
    own = {index: token for token, index in backend.get_vocab().items()}
    for index in range(1 + max(own, default=-1)):
        token = vocabulary.tokens[index] if index < len(vocabulary.tokens) else None
        if own.get(index, token) != token:
            raise BadFile(
                f"{source} has {show(own[index])} as token {index} but tokenizer.ggml.tokens "
                f"{show(token)}: convert the model again"
            )
    special, ends = _special_tokens(vocabulary), vocabulary.end_ids
    return Tokenizer(backend, special, _templates(config), eog_token_ids=ends)


# ---------------------------------------------------------------- models


def _scored(config: Config) -> tuple[Vocabulary, Backend]:
    """SentencePiece's merging: of all pairs that join to a token, that with the best score first.

    The library's ranks are by pair. They come to the same where scores differ; of tokens with one
    score the lower id joins first, where llama.cpp takes the leftmost pair.
    """
    vocabulary = read_vocabulary(config.values, config.source, needed="scores")
    count = len(vocabulary.tokens)
    defaults = {role: index for role, index in _DEFAULT_IDS.items() if index < count}
    vocabulary = replace(vocabulary, ids=defaults | dict(vocabulary.ids))
    _check_bytes(vocabulary)
    unknown = vocabulary.ids.get("unk")
    backend = _bpe(
        vocabulary,
        _merges_by_score(vocabulary),
        byte_fallback=True,
        fuse_unk=True,
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
    )
    parts: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    if config.boolean("tokenizer.ggml.add_space_prefix", True):
        parts.insert(0, normalizers.Prepend(_SPACE))
    backend.normalizer = normalizers.Sequence(parts)
    return vocabulary, backend


def _merged(vocabulary: Vocabulary, facts: PreTokenizerFacts) -> Backend:
    """Merging by a list of pairs, inside the pieces that the pre-tokenizer cuts."""
    missing = ""
    if facts.is_raw:
        _check_bytes(vocabulary)
        backend = _bpe(vocabulary, vocabulary.merges, byte_fallback=True)
        backend.normalizer = normalizers.Replace(" ", _SPACE)
    else:
        missing = _missing_letters(vocabulary)
        backend = _bpe(vocabulary, vocabulary.merges, ignore_merges=facts.ignores_merges)
        backend.decoder = decoders.ByteLevel()
    backend.pre_tokenizer = facts.build(missing)
    return backend


def _bpe(vocabulary: Vocabulary, merges: list[tuple[str, str]], **options: Any) -> Backend:
    id_of = vocabulary.id_of
    for left, right in merges:
        if not (left in id_of and right in id_of and left + right in id_of):
            raise BadFile(
                f"{vocabulary.source}: tokenizer.ggml.merges joins {show(left)} and {show(right)}: "
                "these two and what they make are not all tokens; convert the model again"
            )
    return guarded(vocabulary.source, lambda: Backend(models.BPE(id_of, merges, **options)))


def _merges_by_score(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every pair of tokens that joins to a third, the best scored first, then by ids.

    Takes time and memory in proportion to the vocabulary's characters.
    """
    if sum(map(len, vocabulary.tokens)) > MAX_SCORED_CHARACTERS:
        raise BadFile(
            f"{vocabulary.source}: tokenizer.ggml.tokens has more than {MAX_SCORED_CHARACTERS} "
            "characters: not a model's vocabulary"
        )
    id_of, scores = vocabulary.id_of, vocabulary.scores
    found = []
    for index, token in enumerate(vocabulary.tokens):
        if index in vocabulary.control_ids:
            continue
        if len(token) > MAX_SCORED_LENGTH:
            raise BadFile(
                f"{vocabulary.source}: tokenizer.ggml.tokens[{index}] has {len(token)} characters: "
                f"expected at most {MAX_SCORED_LENGTH}"
            )
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in id_of and right in id_of:
                found.append((-scores[index], index, id_of[left], id_of[right]))
    found.sort()
    tokens = vocabulary.tokens
    return [(tokens[left], tokens[right]) for _, _, left, right in found]


def _check_bytes(vocabulary: Vocabulary) -> None:
    """Characters without a token are written in bytes: all 256 tokens, or none and an unknown."""
    spelled = sum(f"<0x{byte:02X}>" in vocabulary.id_of for byte in range(256))
    if spelled == 256 or (spelled == 0 and "unk" in vocabulary.ids):
        return
    raise BadFile(
        f"{vocabulary.source}: tokenizer.ggml.tokens has {spelled} of the 256 byte tokens <0x00> "
        "to <0xFF>: expected all of them, or none and an unknown token"
    )


def _missing_letters(vocabulary: Vocabulary) -> str:
    """Letters of bytes without a token: some vocabularies lack control characters, unused planes
    and bytes that are not UTF-8. Text needs the others.
    """
    needed = {*b"\t\n\r", *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1)}
    missing = {
        letter: byte
        for letter, byte in bytes_of_letters().items()
        if letter not in vocabulary.id_of
    }
    for letter, byte in missing.items():
        if byte in needed:
            raise BadFile(
                f"{vocabulary.source}: tokenizer.ggml.tokens has no token {show(letter)} for byte "
                f"0x{byte:02X}: convert the model again"
            )
    return "".join(missing)


# ---------------------------------------------------------------- special tokens


def _special_tokens(vocabulary: Vocabulary) -> dict[str, str]:
    """Texts by role, as templates see them."""
    roles = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
    found = {role: vocabulary.ids[role] for role in roles if role in vocabulary.ids}
    return {f"{role}_token": vocabulary.tokens[index] for role, index in found.items()}


def _add_tokens(backend: Backend, vocabulary: Vocabulary, config: Config) -> None:
    """Control tokens, which only a caller may spell, and user-defined ones, found in any text.

    llama.cpp looks for the longest first anywhere, the library for the longest at the leftmost
    place: they differ where the end of one such token is the beginning of another. Spaces behind
    Phi-3's tokens belong to them, a fact that files do not hold; for llama.cpp these are ASCII
    spaces only.
    """
    name = config.text("general.name", "").lower()
    strips = "phi-3" in name or "phi3" in name
    keeps = ("<unk>", "<s>", "<|endoftext|>")

    def added(index: int, is_special: bool) -> AddedToken:
        text = vocabulary.tokens[index]
        rstrip = strips and text not in keeps
        return AddedToken(text, normalized=False, special=is_special, rstrip=rstrip)

    backend.add_special_tokens([added(index, True) for index in sorted(vocabulary.control_ids)])
    backend.add_tokens([added(index, False) for index in sorted(vocabulary.user_defined_ids)])


def _add_ends(backend: Backend, vocabulary: Vocabulary, config: Config, begins: bool) -> None:
    """What stands around a text: the first token, the last, both or none."""
    is_asked = config.boolean("tokenizer.ggml.add_bos_token", False)
    ends = config.boolean("tokenizer.ggml.add_eos_token", False)
    for role, is_needed in (("bos", begins and is_asked), ("eos", ends)):
        if is_needed and role not in vocabulary.ids:
            key = f"tokenizer.ggml.{role}_token_id"
            raise config.bad(key, f"a token, as add_{role}_token is true")
    before = ["bos"] if begins and "bos" in vocabulary.ids else []
    after = ["eos"] if ends else []
    if not before and not after:
        return
    ids = {role: vocabulary.ids[role] for role in (*before, *after)}
    backend.post_processor = TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[
            {"id": role, "ids": [index], "tokens": [vocabulary.tokens[index]]}
            for role, index in ids.items()
        ],
    )


# ---------------------------------------------------------------- text of tokens


def _token_bytes(vocabulary: Vocabulary, backend: Backend) -> Iterator[bytes]:
    """The bytes of each token, whatever stands around it."""
    letters = bytes_of_letters() if backend.decoder is not None else None
    added = vocabulary.control_ids | vocabulary.user_defined_ids
    for index, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if index in added:
            yield text.encode()
        elif kind == TokenType.BYTE:
            spelled = _BYTE.fullmatch(text)
            if spelled is None:
                raise BadFile(
                    f"{vocabulary.source}: tokenizer.ggml.tokens[{index}] is {show(text)}: "
                    "expected a byte such as <0x0A>, as its type says"
                )
            yield bytes.fromhex(spelled[1])
        elif kind != TokenType.NORMAL:
            yield b""
        elif letters is None:
            yield text.replace(_SPACE, " ").encode()
        elif all(letter in letters for letter in text):
            yield bytes(letters[letter] for letter in text)
        else:
            yield text.encode()


# ---------------------------------------------------------------- templates


def _templates(config: Config) -> dict[str, str]:
    """Chat templates by name: `tokenizer.chat_template` is the default one."""
    names = config.values.get("tokenizer.chat_templates", [])
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise config.bad("tokenizer.chat_templates", "a list of strings")
    found = {name: config.text(f"tokenizer.chat_template.{name}") for name in names}
    default = config.text("tokenizer.chat_template", None)
    if default is not None:
        found["default"] = default
    return check_templates(found, config.source)
