"""Copying: lines of the corpus with one name changed or none, and items without any pattern."""

from __future__ import annotations

import re
from random import Random

from vivace.training.corpus import Corpus
from vivace.training.exercises.base import WORDS, Turn

IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z_0-9]{2,}")


def copying(random: Random, difficulty: int, num_tokens: int, corpus: Corpus) -> list[Turn]:
    """Difficulty d: about 2 d lines of the corpus, at most `num_tokens` in all."""
    size = min(80 * difficulty, int(num_tokens * 1.2))
    while True:
        lines = [line for line in corpus.lines(random, size) if line.strip()][: 2 * difficulty + 1]
        while len(lines) > 1 and sum(map(len, lines)) > 1.3 * size:
            lines.pop()
        text = "\n".join(lines)
        names = sorted(set(IDENTIFIER.findall(text)))
        if names and 10 < len(text) <= 2 * size:
            break
    if random.random() < 0.25:
        form = random.choice(("Copy this:\n{}", "Repeat exactly:\n{}"))
        return [Turn("user", form.format(text)), Turn("assistant", text)]
    counts = [text.count(name) for name in names]
    old = random.choices(names, weights=counts)[0]
    new = random.choice([word for word in WORDS if word not in names])
    renamed = re.sub(rf"\b{old}\b", new, text)
    form = random.choice(("Rename {} to {}:\n{}", "Copy this with {} changed to {}:\n{}"))
    return [Turn("user", form.format(old, new, text)), Turn("assistant", renamed)]


def repetition(random: Random, difficulty: int, num_tokens: int, corpus: Corpus) -> list[Turn]:
    """Difficulty d: 4 to 4 + 6 d items, drawn with replacement."""
    pool = random.choice((WORDS, tuple("abcdefghijklmnopqrstuvwxyz"), tuple("0123456789")))
    items = " ".join(random.choices(pool, k=random.randint(4, 4 + 6 * difficulty)))
    form = random.choice(("Repeat these items: {}", "Say it again: {}", "Repeat: {}"))
    return [Turn("user", form.format(items)), Turn("assistant", items)]
