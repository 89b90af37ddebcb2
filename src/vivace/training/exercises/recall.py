"""Recall: facts scattered over filler, then questions about some of them, or all."""

from __future__ import annotations

from random import Random

from vivace.training.corpus import Corpus
from vivace.training.exercises.base import WORDS, Turn

_FACTS = (
    # fact, first question, further question, answer
    (
        "The code for {k} is {v}.",
        "What is the code for {k}?",
        "And for {k}?",
        "The code for {k} is {v}.",
    ),
    ("The code of {k} is {v}.", "What is the code of {k}?", "What about {k}?", "{v}"),
    ("Remember: {k} is {v}.", "What is {k}?", "And {k}?", "{k} is {v}"),
    ("{k} = {v}", "Which value has {k}?", "{k}?", "{v}"),
    (
        "The number of {k} is {v}.",
        "Which number has {k}?",
        "And {k}?",
        "The number of {k} is {v}.",
    ),
    (
        "Note that {k} maps to {v}.",
        "What does {k} map to?",
        "And {k}?",
        "{k} maps to {v}",
    ),
)


def recall(random: Random, difficulty: int, num_tokens: int, corpus: Corpus) -> list[Turn]:
    """Difficulty: the number of facts, 2 to 12; `num_tokens` sizes the filler between them."""
    return _recall(random, difficulty, num_tokens, corpus, asks_all=False)


def quiz(random: Random, difficulty: int, num_tokens: int, corpus: Corpus) -> list[Turn]:
    """Recall with a question about every fact: more to learn from the same filler."""
    return _recall(random, difficulty, num_tokens, corpus, asks_all=True)


def _recall(
    random: Random, num_facts: int, num_tokens: int, corpus: Corpus, asks_all: bool
) -> list[Turn]:
    fact, question, further, answer = random.choice(_FACTS)
    keys = random.sample(WORDS, num_facts)
    if random.random() < 0.7:
        values = [f"{random.randrange(10_000):04d}" for _ in keys]
    else:
        values = random.sample([word for word in WORDS if word not in keys], num_facts)
    num_questions = num_facts if asks_all else min(num_facts, random.randint(2, 5))
    num_filler = num_tokens - 12 * num_facts - 18 * num_questions - 12
    parts = [fact.format(k=k, v=v) for k, v in zip(keys, values, strict=True)]
    parts = _scatter(random, parts, corpus, num_filler)
    asked = random.sample(range(num_facts), num_questions)
    turns = []
    for number, index in enumerate(asked):
        words = {"k": keys[index], "v": values[index]}
        text = (further if number else question).format(**words)
        if number == 0:
            notes = random.choice(("Read these notes.", "Notes:", "Keep this in mind."))
            notes += "\n" + "\n".join(parts)
            if random.random() < 0.25:
                turns.append(Turn("system", notes))
            else:
                text = f"{notes}\n{text}"
        turns += [Turn("user", text), Turn("assistant", answer.format(**words))]
    return turns


def _scatter(random: Random, facts: list[str], corpus: Corpus, num_tokens: int) -> list[str]:
    """Facts in order, at random places among consecutive lines of the corpus."""
    lines: list[str] = []
    while (missing := int(num_tokens * 3.0) - sum(len(line) + 1 for line in lines)) > 0:
        lines += [line for line in corpus.lines(random, missing) if line.strip()]
    places = sorted(random.randint(0, len(lines)) for _ in facts)
    for fact, place in reversed(list(zip(facts, places, strict=True))):
        lines.insert(place, fact)
    return lines
