"""The vocabulary in a GGUF file's metadata, checked: texts, types, scores, merges, special ids.

Which tokens are control tokens and which end an answer follows llama.cpp's `src/llama-vocab.cpp`,
which also goes by well-known texts where a file says nothing or less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np

from vivace.errors import BadFile
from vivace.models.config import Config, show

__all__ = ["ROLES", "TokenType", "Vocabulary", "read_vocabulary"]

MAX_TOKENS = 2**22
_KEY = "tokenizer.ggml."


class TokenType(IntEnum):
    """What `tokenizer.ggml.token_type` says of a token; other numbers count as undefined."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Ids in the metadata, by what the rest calls them. The last three are older names of three others.
ROLES = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
    "cls": "cls_token_id",
    "mask": "mask_token_id",
    "fim_pre": "fim_pre_token_id",
    "fim_suf": "fim_suf_token_id",
    "fim_mid": "fim_mid_token_id",
    "fim_pad": "fim_pad_token_id",
    "fim_rep": "fim_rep_token_id",
    "fim_sep": "fim_sep_token_id",
}
_OLDER_NAMES = {
    "fim_pre": "prefix_token_id",
    "fim_suf": "suffix_token_id",
    "fim_mid": "middle_token_id",
}
# Texts by which a role is found that has no id.
_TEXTS = {
    "eot": (
        "<|eot_id|> <|im_end|> <|end|> <end_of_turn> <|endoftext|> <|end_of_text|> <EOT> _<EOT> "
        "[EOT] <｜end▁of▁sentence｜> <end_of_utterance>"
    ),
    "eom": "<|eom_id|>",
    "fim_pre": (
        "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> "
        "<|prefix|>"
    ),
    "fim_suf": (
        "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> "
        "<|suffix|>"
    ),
    "fim_mid": (
        "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> "
        "<|middle|>"
    ),
    "fim_pad": "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]",
    "fim_rep": "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>",
    "fim_sep": "<|file_sep|>",
}
# Texts of tokens that end an answer, beside those of the roles in `_ENDS`.
_END_TEXTS = (
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> "
    "<|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> "
    "<eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~["
)
_ENDS = ("fim_pad", "fim_rep", "fim_sep", "eos", "eot", "eom")


@dataclass(frozen=True)
class Vocabulary:
    """A checked vocabulary.

    Attributes:
        tokens: texts by id, all different.
        types: by id, as the file has them.
        ids: special token ids by role, such as `bos`.
        scores: by id; empty if the file has none.
        merges: pairs that join, the earliest first; empty if the file has none.
    """

    source: str
    tokens: list[str]
    types: list[int]
    ids: Mapping[str, int]
    scores: list[float]
    merges: list[tuple[str, str]]

    @cached_property
    def id_of(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Tokens that no text of a user may make, the unknown ones among them."""
        kinds = (TokenType.CONTROL, TokenType.UNKNOWN)
        marked = {index for index, kind in enumerate(self.types) if kind in kinds}
        by_text = {self.id_of[text] for text in _END_TEXTS.split() if text in self.id_of}
        by_role = {index for role, index in self._roles.items() if self._is_by_text(role)}
        return frozenset(marked | by_text | by_role) - self._plain_ids

    @cached_property
    def user_defined_ids(self) -> frozenset[int]:
        """Tokens that are found in any text before it is cut."""
        kind = TokenType.USER_DEFINED
        found = {index for index, item in enumerate(self.types) if item == kind}
        return frozenset(found) - self.control_ids

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        found = {self._roles[role] for role in _ENDS if role in self._roles}
        found |= {self.id_of[text] for text in _END_TEXTS.split() if text in self.id_of}
        texts = {self.tokens[index] for index in found}
        # Where an answer has channels, this token only ends one of them.
        is_channelled = {"<|return|>", "<|call|>"} <= texts or {"<|calls|>", "<|flush|>"} <= texts
        if is_channelled:
            found.discard(self.id_of.get("<|end|>", -1))
        return frozenset(found) - self._plain_ids

    @cached_property
    def _plain_ids(self) -> frozenset[int]:
        """`</s>` is the tag for struck-out text in vocabularies with a turn's own end token."""
        is_tag = "<|tool_response>" in self.id_of and "</s>" in self.id_of
        return frozenset({self.id_of["</s>"]} if is_tag else ())

    @cached_property
    def _roles(self) -> dict[str, int]:
        """Ids by role, given or found by text; of several texts the one with the lowest id."""
        found = {
            role: min(self.id_of[text] for text in texts.split() if text in self.id_of)
            for role, texts in _TEXTS.items()
            if any(text in self.id_of for text in texts.split())
        }
        return found | dict(self.ids)

    def _is_by_text(self, role: str) -> bool:
        return role not in self.ids


def read_vocabulary(metadata: Mapping[str, Any], source: str, needed: str) -> Vocabulary:
    """The vocabulary; `needed` is what its kind cannot do without: `scores` or `merges`.

    Raises `BadFile`.
    """
    tokens = _texts(metadata, "tokens", source)
    if not 0 < len(tokens) <= MAX_TOKENS:
        raise BadFile(
            f"{source}: {_KEY}tokens has {len(tokens)} entries: expected 1 to {MAX_TOKENS}"
        )
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    if len(set(tokens)) != len(tokens):
        twice = _first_repeated(tokens)
        raise BadFile(f"{source}: {_KEY}tokens has {show(twice)} twice: expected different texts")
    count = len(tokens)
    types = _numbers(metadata, "token_type", source, count, "iu", is_needed=False)
    scores = _numbers(metadata, "scores", source, count, "fiu", is_needed=needed == "scores")
    return Vocabulary(
        source,
        tokens,
        [TokenType.NORMAL] * count if types is None else types.tolist(),
        _special_ids(metadata, source, count),
        [] if scores is None else _finite(scores, source).tolist(),
        _merges(metadata, source) if needed == "merges" else [],
    )


def _special_ids(metadata: Mapping[str, Any], source: str, count: int) -> dict[str, int]:
    config = Config(metadata, source)
    found = {}
    for names in (_OLDER_NAMES, ROLES):
        for role, name in names.items():
            index = config.integer(_KEY + name, None, low=0, high=count - 1)
            if index is not None:
                found[role] = index
    return found


def _texts(metadata: Mapping[str, Any], name: str, source: str) -> list[str]:
    """A list of strings that UTF-8 can hold."""
    values = metadata.get(_KEY + name)
    if not isinstance(values, list | tuple) or not all(isinstance(item, str) for item in values):
        is_there = "is not a list of strings" if _KEY + name in metadata else "is missing"
        raise BadFile(f"{source}: {_KEY}{name} {is_there}: convert the model again")
    try:
        "".join(values).encode()
    except UnicodeEncodeError as error:
        raise BadFile(
            f"{source}: {_KEY}{name} has an entry that is not UTF-8: convert the model again"
        ) from error
    return list(values)


def _numbers(
    metadata: Mapping[str, Any], name: str, source: str, count: int, kinds: str, is_needed: bool
) -> np.ndarray | None:
    """A list of `count` numbers of a dtype kind, such as `iu` for whole ones."""
    key = _KEY + name
    if key not in metadata:
        if is_needed:
            raise BadFile(f"{source}: {key} is missing: convert the model again")
        return None
    try:
        values = np.asarray(metadata[key])
    except (ValueError, TypeError, OverflowError):
        values = np.empty(0, dtype=object)
    if values.dtype.kind not in kinds or values.ndim != 1:
        wanted = "whole numbers" if "f" not in kinds else "numbers"
        raise BadFile(f"{source}: {key} is not a list of {wanted}: convert the model again")
    if len(values) != count:
        raise BadFile(
            f"{source}: {key} has {len(values)} entries but {_KEY}tokens has {count}: "
            "convert the model again"
        )
    return values


def _finite(scores: np.ndarray, source: str) -> np.ndarray:
    if not np.isfinite(scores).all():
        raise BadFile(f"{source}: {_KEY}scores has a value that is not a finite number")
    return scores


def _merges(metadata: Mapping[str, Any], source: str) -> list[tuple[str, str]]:
    """Pairs written with one space between; the first place of a repeated one counts."""
    pairs = []
    for index, text in enumerate(_texts(metadata, "merges", source)):
        cut = text.find(" ", 1)
        if cut < 0 or cut == len(text) - 1:
            raise BadFile(
                f"{source}: {_KEY}merges[{index}] is {show(text)}: expected two texts and a space"
            )
        pairs.append((text[:cut], text[cut + 1 :]))
    return list(dict.fromkeys(pairs))


def _first_repeated(tokens: Sequence[str]) -> str:
    seen: set[str] = set()
    for token in tokens:
        if token in seen:
            return token
        seen.add(token)
    raise AssertionError
