"""A tokenizer as the keys `tokenizer.*` of a GGUF file's metadata.

The keys are read back: a tokenizer that they cannot describe is refused. GGUF has no normaliser, so
that a text is taken as it is where the tokenizer would normalise it to NFC.

Where some texts become other tokens for programs that know a vocabulary by the name of its
pre-tokenizer, the file holds the whole tokenizer as well (`tokenizer.huggingface.json`), by which
it means here exactly what it was made from.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from vivace.errors import BadFile, InvalidOption, UnsupportedModel, nearest
from vivace.models.gguf.pre_tokenizer_names import cuts_like, find_pre_name, is_byte_level
from vivace.models.gguf.pre_tokenizers import PRE_TOKENIZERS
from vivace.models.gguf.tokenizer import WHOLE_TOKENIZER, tokenizer_from_metadata
from vivace.models.gguf.vocabulary import ROLES, TokenType
from vivace.models.tokenizer import Tokenizer

__all__ = ["tokenizer_keys"]

_KEY = "tokenizer.ggml."
_MAX_VOCABULARY_TEXTS = 2**14
_MAX_TAGS = 64
# Cut alike by every program that knows a pattern: where their tokens differ, so does the tokenizer.
_PLAIN_TEXTS = (
    "",
    "Hello world",
    "The quick brown fox's den isn't where we'll look; I'm sure they've 12 or 345.",
    "HELLO World hello camelCase snake_case",
    "1 12 123 1234 12345 3.14 1,000,000 x1y22z333",
    "x = y+1; if (a == b) { return c[i]; }  // done\n\treturn n-1;\r\n",
    "a  b   c    d\n\n  e\t\tf\n\n\n   g  ",
    "Привет, мир! Ελλάδα. שלום عربي",
    "日本語のテキスト、東京。中文，测试！ 한국어",
    "Straße naïve café — “quoted” … € ½ ² 🙂 👩\u200d👧",
)
# On some of these, published patterns and those of GGUF files differ.
_ODD_TEXTS = (
    " leading",
    "  two",
    "\n",
    "I'M WE'LL 'llama 'the ÉcOLE ПРИвет HTTPServer",
    "हिन्दी में ภาษาไทย",
    "a\u00a0b\u3000c\u2028d",
    "<s> </s> <|im_end|> <|endoftext|> <0x0A> ▁",
)


def tokenizer_keys(tokenizer: Tokenizer, graph_vocab_size: int, pre: str | None) -> dict[str, Any]:
    """The metadata of a tokenizer; ids without a token get one that is never used.

    Args:
        tokenizer: one that merges.
        graph_vocab_size: rows of the model's embedding.
        pre: the name of a byte-level vocabulary's pre-tokenizer; None: found by its patterns.
    Returns:
        Keys `tokenizer.*`, and `general.name` where that is how files say that spaces after control
        tokens belong to them.
    Raises:
        UnsupportedModel: GGUF has no such kind, or the keys mean other tokens.
        InvalidOption: `pre` is not known, or has no place.
    """
    state = tokenizer.to_state()
    model = state["model"]
    has_merges = model["type"] == "BPE" and model["merges"]
    affixes = ("continuing_subword_prefix", "end_of_word_suffix", "dropout")
    is_byte_based = model.get("byte_fallback") or is_byte_level(state["pre_tokenizer"])
    if not has_merges or any(model[name] for name in affixes) or not is_byte_based:
        raise UnsupportedModel(
            f"the tokenizer is of kind {model['type']}: what can be written as GGUF is byte-level "
            "BPE, and BPE of SentencePiece with bytes as a fallback"
        )
    keys = _vocabulary(state, graph_vocab_size)
    keys |= _kind(state, keys["tokens"], pre) | _special_ids(tokenizer)
    keys = {_KEY + key: value for key, value in keys.items()} | _templates(tokenizer)
    if any(token["rstrip"] for token in state["added_tokens"]):
        keys["general.name"] = "phi-3"
    return _checked(tokenizer, keys, means_another=_means_another(state, pre))


# ---------------------------------------------------------------- vocabularies


def _vocabulary(state: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Texts and types of tokens by id."""
    model = state["model"]
    texts = {index: text for text, index in model["vocab"].items()}
    texts |= {token["id"]: token["content"] for token in state["added_tokens"]}
    types = dict.fromkeys(texts, TokenType.NORMAL)
    if model["byte_fallback"]:
        byte_tokens = {f"<0x{byte:02X}>" for byte in range(256)}
        types |= {index: TokenType.BYTE for index, text in texts.items() if text in byte_tokens}
    for token in state["added_tokens"]:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        is_unknown = model["byte_fallback"] and token["content"] == model["unk_token"]
        types[token["id"]] = TokenType.UNKNOWN if is_unknown else kind
    ids = range(max(size, 1 + max(texts)))
    return {
        "tokens": [texts.get(index, f"[PAD{index}]") for index in ids],
        "token_type": [int(types.get(index, TokenType.UNUSED)) for index in ids],
    }


def _kind(state: Mapping[str, Any], tokens: Sequence[str], pre: str | None) -> dict[str, Any]:
    """The kind of vocabulary, with what only this kind has."""
    model = state["model"]
    merges = [" ".join(pair) for pair in model["merges"]]
    name = find_pre_name(state["pre_tokenizer"], model["ignore_merges"])
    if not model["byte_fallback"]:
        pre = name if pre is None and _is_taken_as_it_is(state) else pre
        if pre is None:
            raise UnsupportedModel(
                "the tokenizer cuts or normalises texts in a way that has no name in GGUF: "
                "--pre NAME writes it under the name of one all the same, with which other "
                "programs cut some texts differently"
            )
        return {"model": "gpt2", "pre": _checked_name(pre), "merges": merges}
    if pre is not None:
        raise InvalidOption(
            f"--pre {pre} has no place: the tokenizer is of SentencePiece's kind, which is not cut"
        )
    if name == "gemma4":
        return {"model": "gemma4", "merges": merges}
    return {
        "model": "llama",
        "pre": "default",
        "scores": _scores(model, tokens),
        "add_space_prefix": _adds_space(state),
    }


def _is_taken_as_it_is(state: Mapping[str, Any]) -> bool:
    """Whether texts are not normalised, or to NFC."""
    return state["normalizer"] in (None, {"type": "NFC"})


def _means_another(state: Mapping[str, Any], pre: str | None) -> bool:
    """Whether a name was chosen that does not stand for what the tokenizer does."""
    cutter, ignores_merges = state["pre_tokenizer"], state["model"]["ignore_merges"]
    is_right = pre is None or (cuts_like(pre, cutter, ignores_merges) and _is_taken_as_it_is(state))
    return not is_right


def _checked_name(pre: str) -> str:
    known = [name for name, facts in PRE_TOKENIZERS.items() if not facts.is_raw]
    if pre not in known:
        raise InvalidOption(f"--pre {pre} is not known: {nearest(pre, known)}")
    return pre


def _scores(model: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """The higher, the earlier a token is merged; tokens that no pair makes come last."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(model["merges"]):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(model["merges"]))) for token in tokens]


def _adds_space(state: Mapping[str, Any]) -> bool:
    """Whether a text gets a space before its first word."""
    normalizer, cutter = state["normalizer"] or {}, state["pre_tokenizer"] or {}
    parts = [normalizer, *normalizer.get("normalizers", ())]
    parts += [cutter, *cutter.get("pretokenizers", ())]
    return any(
        part.get("type") == "Prepend" or part.get("prepend_scheme", "never") != "never"
        for part in parts
    )


# ---------------------------------------------------------------- what stands around texts


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Ids by role, and whether a text begins with the first token and ends with the last."""
    roles = [(role, f"{role}_token") for role in ROLES]
    ids = {
        role: tokenizer.token_to_id(tokenizer.special_tokens[name])
        for role, name in roles
        if name in tokenizer.special_tokens
    }
    ids = {role: index for role, index in ids.items() if index is not None}
    plain = tokenizer.encode("a", add_special=False)
    whole = tokenizer.encode("a")
    begin = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    before, after = whole[:begin], whole[begin + len(plain) :]
    for role, around in (("bos", before), ("eos", after)):
        if len(around) > 1 or (around and ids.setdefault(role, around[0]) != around[0]):
            raise UnsupportedModel(
                f"the tokenizer puts {around} around a text: GGUF has a place for one "
                f"{role}_token there"
            )
    keys: dict[str, Any] = {ROLES[role]: index for role, index in ids.items()}
    return keys | {"add_bos_token": bool(before), "add_eos_token": bool(after)}


def _templates(tokenizer: Tokenizer) -> dict[str, Any]:
    others = dict(tokenizer.templates)
    default = others.pop("default", None)
    keys: dict[str, Any] = {} if default is None else {"tokenizer.chat_template": default}
    if others:
        keys["tokenizer.chat_templates"] = list(others)
    return keys | {f"tokenizer.chat_template.{name}": text for name, text in others.items()}


# ---------------------------------------------------------------- what the keys mean


def _checked(tokenizer: Tokenizer, keys: dict[str, Any], means_another: bool) -> dict[str, Any]:
    """The keys, with the whole tokenizer where they alone mean other tokens for some texts."""
    read = _read(keys)
    is_scored = keys[_KEY + "model"] == "llama"
    for role in ("bos_token", "eos_token"):
        if role in read.special_tokens and getattr(tokenizer, f"{role}_id") is None and is_scored:
            raise UnsupportedModel(
                f"the tokenizer has no {role}, which a GGUF file of this kind always has: name one "
                "in tokenizer_config.json"
            )
    # Spaces that begin a text are not always taken as such a vocabulary takes them.
    vocabulary = _vocabulary_texts(tokenizer, before="x " if is_scored else "")
    certain = [*_PLAIN_TEXTS, *(vocabulary if is_scored else ())]
    other = None if means_another else _first_that_differs(tokenizer, read, certain)
    if other is not None:
        raise UnsupportedModel(
            f"the tokenizer makes other tokens of {other[:40]!r} than GGUF's keys can say: "
            "run the model from its own files"
        )
    texts = _all_texts(tokenizer, vocabulary)
    if not means_another and _first_that_differs(tokenizer, read, texts) is None:
        return keys
    keys[WHOLE_TOKENIZER] = tokenizer.to_json()
    other = _first_that_differs(tokenizer, _read(keys), texts)
    assert other is None, other
    return keys


def _read(keys: Mapping[str, Any]) -> Tokenizer:
    try:
        return tokenizer_from_metadata(keys, "the new file")
    except BadFile as error:
        raise UnsupportedModel(f"the tokenizer cannot be written as GGUF: {error}") from error


def _vocabulary_texts(tokenizer: Tokenizer, before: str) -> list[str]:
    """What tokens spell behind `before`, of a large vocabulary of some that are spread over it."""
    step = 1 + tokenizer.vocab_size // _MAX_VOCABULARY_TEXTS
    texts = (tokenizer.decode([index]) for index in range(0, tokenizer.vocab_size, step))
    is_usual = partial(unicodedata.is_normalized, "NFC")
    return [before + text for text in filter(is_usual, texts) if "\ufffd" not in text]


def _all_texts(tokenizer: Tokenizer, vocabulary: Iterable[str]) -> list[str]:
    tags = [tokenizer.id_to_token(index) for index in sorted(tokenizer.added_ids)[:_MAX_TAGS]]
    return [*_PLAIN_TEXTS, *_ODD_TEXTS, *(f"a {tag} \nb{tag}c" for tag in tags), *vocabulary]


def _first_that_differs(a: Tokenizer, b: Tokenizer, texts: Iterable[str]) -> str | None:
    """The first text of which two tokenizers make other tokens, or other texts of these."""
    for text in texts:
        for allow_special in (False, True):
            ids = a.encode(text, allow_special=allow_special)
            if ids != b.encode(text, allow_special=allow_special) or a.decode(ids) != b.decode(ids):
                return text
    return None
