"""Exercises with one right answer each; a dial sets the difficulty, (seed, index) the draw."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from vivace.errors import InvalidOption
from vivace.training.corpus import Corpus, Split, read_corpus, split_of
from vivace.training.exercises.arithmetic import arithmetic
from vivace.training.exercises.base import WORDS, Exercise, Turn
from vivace.training.exercises.conversation import chat, phrasing
from vivace.training.exercises.copying import copying, repetition
from vivace.training.exercises.procedures import procedures
from vivace.training.exercises.recall import quiz, recall

__all__ = ["KINDS", "WORDS", "Exercise", "Turn", "make_exercise"]

_HELD_OUT_ONE_IN = 20


KINDS: dict[str, Callable[[Random, int, int, Corpus], list[Turn]]] = {
    "arithmetic": arithmetic,
    "procedures": procedures,
    "recall": recall,
    "copying": copying,
    "repetition": repetition,
    "phrasing": phrasing,
    "quiz": quiz,
    "chat": chat,
}


def make_exercise(
    kind: str,
    difficulty: int,
    seed: int,
    index: int,
    split: Split,
    num_tokens: int = 128,
) -> Exercise:
    """The exercise of `(kind, difficulty, seed, index)` in a split.

    `num_tokens` is the size aimed at where filler or text sets it (recall, copying). Draws repeat
    until one falls in the split, which a hash of the questions decides: no question is in both.

    Raises `InvalidOption` for a difficulty below 1.
    """
    if difficulty < 1:
        raise InvalidOption(f"difficulty is {difficulty}: expected a whole number from 1 on")
    corpus = read_corpus(split)
    for attempt in range(10_000):
        random = Random(f"{kind}/{difficulty}/{seed}/{index}/{num_tokens}/{split}/{attempt}")
        turns = KINDS[kind](random, difficulty, num_tokens, corpus)
        questions = "\n".join(turn.text for turn in turns if turn.role != "assistant")
        if split_of(questions, _HELD_OUT_ONE_IN) == split or kind == "chat":
            return Exercise(kind, difficulty, tuple(turns))
    raise AssertionError(f"no draw of {kind} at difficulty {difficulty} fell in split {split!r}")
