"""Rows of training tokens: documents packed back to back, each token with its loss weight."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
from tokenizers import Tokenizer

from vivace.training.corpus import Split, read_corpus
from vivace.training.exercises import Exercise, make_exercise
from vivace.training.recipe import Stage
from vivace.training.tokenizer import BEGIN, END, token_id

__all__ = ["KIND_IDS", "Batch", "Packer"]

KIND_IDS = {
    "text": 0, "arithmetic": 1, "procedures": 2, "recall": 3, "copying": 4, "chat": 5,
    "repetition": 6, "phrasing": 7, "quiz": 8,
}  # fmt: skip
_TEXT_WEIGHT = 0.5  # of a token of plain text; an answer's token counts 1, a question's 0


@dataclass(frozen=True)
class Batch:
    """Rows to learn from; targets are the tokens one place further on."""

    tokens: np.ndarray  # [num_rows, context + 1] int64
    weights: np.ndarray  # [num_rows, context] float32: what each target counts
    kinds: np.ndarray  # [num_rows, context] int64: the kind of each target, for the log


class Packer:
    """Builds the batch of any step from (seed, step) alone, so that a run can resume anywhere."""

    def __init__(self, tokenizer: Tokenizer, seed: int, split: Split = "train") -> None:
        self.tokenizer = tokenizer
        self.seed = seed
        self.split: Split = split
        self.special = {
            role: token_id(tokenizer, f"<|{role}|>") for role in ("system", "user", "assistant")
        }
        self.begin, self.end = token_id(tokenizer, BEGIN), token_id(tokenizer, END)

    def batch(self, stage: Stage, step: int) -> Batch:
        """Rows of `stage.context` tokens; kinds are drawn so that their tokens match the mix."""
        random = Random(f"{self.seed}/{step}")
        length = stage.context + 1
        tokens = np.zeros((stage.num_rows, length), dtype=np.int64)
        weights = np.zeros((stage.num_rows, length), dtype=np.float32)
        kinds = np.zeros((stage.num_rows, length), dtype=np.int64)
        spent = {kind: random.random() * 100 for kind in stage.mix}
        number = 0
        for row in range(stage.num_rows):
            filled = 0
            while filled < length:
                room = length - filled
                kind = max(
                    stage.mix,
                    key=lambda k: stage.mix[k] * sum(spent.values()) - spent[k],
                )
                ids, values = self._document(random, stage, kind, (step, number), room)
                number += 1
                if len(ids) > room and kind != "text":  # no room for the answer: end with text
                    kind = "text"
                    ids, values = self._text(random, room)
                take = min(len(ids), room)
                place = slice(filled, filled + take)
                tokens[row, place], weights[row, place] = ids[:take], values[:take]
                kinds[row, place] = KIND_IDS[kind]
                spent[kind] += take
                filled += take
        return Batch(tokens, weights[:, 1:], kinds[:, 1:])

    def encode(self, exercise: Exercise) -> tuple[list[int], list[float]]:
        """Token ids of a conversation and what each counts: answers with their end token 1."""
        ids, weights = [self.begin], [0.0]
        for turn in exercise.turns:
            is_answer = turn.role == "assistant"
            content = self.tokenizer.encode(turn.text, add_special_tokens=False).ids
            ids += [self.special[turn.role], *content, self.end]
            weights += [0.0, *[float(is_answer)] * (len(content) + 1)]
        return ids, weights

    def _document(
        self, random: Random, stage: Stage, kind: str, index: tuple[int, int], room: int
    ) -> tuple[list[int], list[float]]:
        if kind == "text":
            return self._text(random, random.randint(64, 512))
        difficulties = stage.difficulties.get(kind, {1: 1.0})
        difficulty = random.choices(list(difficulties), list(difficulties.values()))[0]
        size = 96
        if kind in ("recall", "quiz"):
            # A third fills what is left of the row, the others are shorter.
            size = room - 24 if random.random() < 0.34 else random.randint(96, max(97, room))
        elif kind == "copying":
            size = random.randint(32, 160)
        number = index[0] * 100_000 + index[1]
        exercise = make_exercise(kind, difficulty, self.seed, number, self.split, size)
        ids, weights = self.encode(exercise)
        if random.random() < 0.2:  # a further question in the conversation before
            ids, weights = ids[1:], weights[1:]
        return ids, weights

    def _text(self, random: Random, num_tokens: int) -> tuple[list[int], list[float]]:
        lines = read_corpus(self.split).lines(random, 4 * num_tokens)
        ids = self.tokenizer.encode("\n".join(lines), add_special_tokens=False).ids[:num_tokens]
        return [self.begin, *ids], [0.0, *[_TEXT_WEIGHT] * len(ids)]
