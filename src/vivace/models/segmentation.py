"""Tokens of a vocabulary without its merges: the longest first, or the fewest.

Paper: Sawada and Goyal, "Train It and Forget It: Merge Lists are Unnecessary for BPE Inference in
Language Models", 2025, arXiv 2508.06621.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Literal, Protocol, get_args

from tokenizers import Encoding, models
from tokenizers import Tokenizer as Backend

from vivace.errors import InvalidOption, nearest

__all__ = [
    "Encoded",
    "Joined",
    "Segmenter",
    "Span",
    "Tokenization",
    "check_tokenization",
]

Tokenization = Literal["merges", "greedy", "shortest"]
Span = tuple[int, int]

_CACHED_LENGTH = 64  # characters; longer pieces seldom come again


class Encoded(Protocol):
    """Tokens with the characters they stand for, as the library gives them and we do."""

    @property
    def ids(self) -> list[int]: ...
    @property
    def offsets(self) -> list[Span]: ...
    @property
    def special_tokens_mask(self) -> list[int]:
        """1 for tokens that stand around the text."""
        ...


@dataclass(frozen=True, slots=True)
class Joined:
    """`Encoded` put together from parts."""

    ids: list[int]
    offsets: list[Span]
    special_tokens_mask: list[int]


def check_tokenization(name: str) -> None:
    """Raises `InvalidOption`."""
    if name not in get_args(Tokenization):
        raise InvalidOption(f"tokenization is {name!r}: {nearest(name, get_args(Tokenization))}")


class Segmenter:
    """Joins the single characters that a vocabulary without merges gives.

    Inside each piece that the pre-tokenizer cuts, `greedy` takes the longest token that begins the
    rest, from left to right; `shortest` takes the fewest tokens, and of such ways the one whose
    first token is the longest, then whose second is, and so on. Only tokens that text is made of
    take part: none that was added, no byte.

    Cost: linear in the text, times the number of lengths that tokens with the same first two
    characters have.

    Args:
        backend: a BPE tokenizer, which is copied.
    Raises:
        InvalidOption: the vocabulary is of another kind.
    """

    def __init__(self, backend: Backend, mode: Tokenization) -> None:
        model = backend.model
        affixes = ("continuing_subword_prefix", "end_of_word_suffix")
        if not isinstance(model, models.BPE) or any(getattr(model, name) for name in affixes):
            raise InvalidOption(
                f"tokenization is '{mode}' but the model's vocabulary is not plain BPE: "
                "leave it at 'merges'"
            )
        self.backend = Backend.from_str(backend.to_str())
        added = backend.get_added_tokens_decoder()
        vocabulary = backend.get_vocab(with_added_tokens=False)
        self.backend.model = models.BPE(
            vocabulary,
            [],
            unk_token=model.unk_token,
            fuse_unk=model.fuse_unk,
            byte_fallback=model.byte_fallback,
        )
        byte_tokens = {f"<0x{byte:02X}>" for byte in range(256)} if model.byte_fallback else set()
        self._id_of = {
            token: index
            for token, index in vocabulary.items()
            if index not in added and token not in byte_tokens and token != model.unk_token
        }
        self._letter_of = {index: token for token, index in self._id_of.items() if len(token) == 1}
        self._lengths = _lengths_by_start(self._id_of)
        search = self._greedy if mode == "greedy" else self._shortest
        self._search: Callable[[str], tuple[int, ...]] = search
        self._search_cached = lru_cache(maxsize=2**14)(search)

    def __call__(self, encoding: Encoding) -> Encoded:
        """The tokens of what `backend` made of a text."""
        ids: list[int] = []
        offsets: list[Span] = []
        mask: list[int] = []
        given_ids, given_offsets = encoding.ids, encoding.offsets
        given_mask = encoding.special_tokens_mask
        for begin, end, text in self._runs(encoding):
            if text is None:
                ids += given_ids[begin:end]
                offsets += given_offsets[begin:end]
                mask += given_mask[begin:end]
                continue
            is_short = len(text) <= _CACHED_LENGTH
            at = begin
            for length in self._search_cached(text) if is_short else self._search(text):
                last = at + length - 1
                ids.append(self._id_of[text[at - begin : last - begin + 1]])
                offsets.append((given_offsets[at][0], given_offsets[last][1]))
                at += length
            mask += [0] * (len(ids) - len(mask))
        return Joined(ids, offsets, mask)

    def _runs(self, encoding: Encoding) -> Iterator[tuple[int, int, str | None]]:
        """Ranges of tokens that one piece holds and their letters, or None where there are none."""
        letter_of = self._letter_of
        rows = enumerate(zip(encoding.ids, encoding.word_ids, strict=True))
        for (_, is_letter), group in groupby(rows, lambda row: (row[1][1], row[1][0] in letter_of)):
            items = list(group)
            begin, end = items[0][0], items[-1][0] + 1
            text = "".join(letter_of[token] for _, (token, _) in items) if is_letter else None
            yield begin, end, text

    def _greedy(self, text: str) -> tuple[int, ...]:
        """Lengths of the tokens."""
        found, at = [], 0
        while at < len(text):
            length = next(self._matches(text, at))
            found.append(length)
            at += length
        return tuple(found)

    def _shortest(self, text: str) -> tuple[int, ...]:
        size = len(text)
        fewest = [0] * (size + 1)  # tokens from here to the end
        best = [1] * size  # length of the first of them
        for at in range(size - 1, -1, -1):
            count, negative = min((fewest[at + n], -n) for n in self._matches(text, at))
            fewest[at], best[at] = count + 1, -negative
        found, at = [], 0
        while at < size:
            found.append(best[at])
            at += best[at]
        return tuple(found)

    def _matches(self, text: str, at: int) -> Iterator[int]:
        """Lengths of the tokens that begin here, the longest first."""
        id_of = self._id_of
        room = len(text) - at
        for length in self._lengths.get(text[at : at + 2], ()):
            if length <= room and text[at : at + length] in id_of:
                yield length
        yield 1


def _lengths_by_start(tokens: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """The lengths above 1 that tokens have, the longest first, by their first two characters."""
    found: dict[str, set[int]] = {}
    for token in tokens:
        if len(token) > 1:
            found.setdefault(token[:2], set()).add(len(token))
    return {start: tuple(sorted(lengths, reverse=True)) for start, lengths in found.items()}
