"""What a request must give, worked out alone: no cache, no batch, no engine."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from world import EOS, PIECES, draw_token, reference_logits

from vivace.types import RandomKey, SamplingParams


@dataclass(frozen=True)
class Answer:
    token_ids: list[int]
    text: str
    finish_reason: str
    logprobs: list[float]


def answer(
    tokens: Sequence[int],
    params: SamplingParams,
    seed: int,
    stream: int,
    windows: Sequence[int | None],
    max_tokens: int,
) -> Answer:
    """The whole output after `tokens`; `max_tokens` is what context and cache leave."""
    known = list(tokens)
    stop_ids = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
    new: list[int] = []
    logprobs: list[float] = []
    text = _Text(params)
    reason = "length"
    while len(new) < max_tokens:
        logits = reference_logits(known, windows)
        banned = stop_ids if len(new) < params.min_tokens else ()
        token = draw_token(logits, params, RandomKey(seed, stream, len(known)), sorted(banned))
        known.append(token)
        new.append(token)
        logprobs.append(float(logits[token]))
        if token in stop_ids or text.add(token, len(new)):
            reason = "stop"
            break
    return Answer(new, text.finish(), reason, logprobs)


class _Text:
    """Looks for stop strings in the whole text, the slow way."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.text = ""
        self.first = 0  # stop strings begin here or later
        self.is_cut = False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int, count: int) -> bool:
        self.text += self.decoder.decode(PIECES[token])
        if count <= self.params.min_tokens:
            self.first = len(self.text)
            return False
        return self.cut()

    def cut(self) -> bool:
        for end in range(self.first + 1, len(self.text) + 1):
            for start in range(self.first, end):
                if self.text[start:end] in self.params.stop:
                    self.text = self.text[: end if self.params.include_stop else start]
                    self.is_cut = True
                    return True
        return False

    def finish(self) -> str:
        if not self.is_cut:
            self.text += self.decoder.decode(b"", final=True)
            self.cut()
        return self.text
