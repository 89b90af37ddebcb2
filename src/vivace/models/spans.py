"""Which characters of a text each of its tokens stands for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from vivace.models.segmentation import Encoded, Span

__all__ = ["TokenSpan", "covering_spans"]


class TokenSpan(NamedTuple):
    """A token and the characters `text[begin:end]` it stands for."""

    token_id: int
    begin: int
    end: int


def covering_spans(encoded: Encoded, num_characters: int, space_id: int | None) -> list[TokenSpan]:
    """Spans in order that together cover the text.

    Tokens that share a character span all of it. A character that the tokenizer drops, or joins to
    the one before, belongs to the token before. Tokens that the tokenizer adds have empty spans:
    those around a text, and the token `space_id` where it stands for a space that was put in front.
    """
    ids, given, mask = encoded.ids, encoded.offsets, encoded.special_tokens_mask
    inside = [index for index, is_around in enumerate(mask) if not is_around]
    put = {
        index
        for index, after in itertools.pairwise(inside)
        if ids[index] == space_id and given[index][0] == given[after][0]
    }
    spelled = [index for index in inside if index not in put]
    covering = _without_gaps([given[index] for index in spelled], num_characters)
    spans = dict(zip(spelled, covering, strict=True))
    rows, at = [], 0
    for index, token_id in enumerate(ids):
        begin, end = spans.get(index, (at, at))
        rows.append(TokenSpan(token_id, begin, end))
        at = num_characters if inside and index >= inside[-1] else max(at, end)
    return rows


def _without_gaps(spans: Sequence[Span], num_characters: int) -> list[Span]:
    """Spans whose begins and ends never fall and which leave nothing out."""
    begins = list(itertools.accumulate((begin for begin, _ in spans), max))
    ends = list(itertools.accumulate((end for _, end in spans), max))
    filled = [num_characters] * len(spans)
    for place in range(len(spans) - 2, -1, -1):
        is_shared = ends[place] == ends[place + 1]
        after = filled[place + 1] if is_shared else begins[place + 1]
        filled[place] = max(ends[place], after)
    first = begins[0] if begins else 0
    begins = [0 if begin == first else begin for begin in begins]
    return list(zip(begins, filled, strict=True))
