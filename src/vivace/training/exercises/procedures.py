"""Procedures: a list goes through named steps; each step's result is written out."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from vivace.training.corpus import Corpus
from vivace.training.exercises.base import WORDS, Turn


def procedures(random: Random, difficulty: int, num_tokens: int, corpus: Corpus) -> list[Turn]:
    """Difficulty d: about 2 + d items; one step below 3, two from 3, three from 6."""
    num_steps = 1 if difficulty < 3 else 2 if difficulty < 6 else 3
    if random.random() < 0.3:
        num_steps = random.randint(1, num_steps)
    items = draw_items(random, random.randint(1, 2) + difficulty + (difficulty < 3))
    requests, lines = [], []
    current = items
    for step in range(num_steps):
        names = list(LIST_STEPS) + (list(ANSWER_STEPS) if step == num_steps - 1 else [])
        while True:
            name = random.choice(names)
            if name in LIST_STEPS:
                drawn = LIST_STEPS[name](random, current)
            else:
                drawn = ANSWER_STEPS[name](random, current)
            if drawn is not None:
                break
        request, label, result, current = drawn
        requests.append(request)
        lines.append(f"{label}: {result}")
    opening = random.choice(("Take the list: {}.", "List: {}.", "Here is a list: {}."))
    question = opening.format(" ".join(items)) + " " + " ".join(requests)
    return [Turn("user", question), Turn("assistant", "\n".join(lines))]


def draw_items(random: Random, num_items: int) -> list[str]:
    kind = random.choice(("letters", "words", "numbers"))
    if kind == "letters":
        pool = list("abcdefghijklmnopqrstuvwxyz")
    elif kind == "words":
        pool = list(WORDS)
    else:
        pool = [str(number) for number in range(1, 100)]
    items = random.sample(pool, num_items)
    if random.random() < 0.4:  # some lists repeat an item
        items[random.randrange(num_items)] = items[random.randrange(num_items)]
    return items


Drawn = tuple[str, str, str, list[str]]  # request, label, result as text, list that goes on


def _listed(request: str, label: str, items: list[str]) -> Drawn:
    return request, label, " ".join(items) if items else "nothing", items


def _is_number(items: list[str]) -> bool:
    return all(item.isdigit() for item in items)


def _order(item: str) -> tuple[int, str]:
    return (int(item), "") if item.isdigit() else (0, item)


def _reverse(random: Random, items: list[str]) -> Drawn:
    return _listed("Reverse it.", "reversed", items[::-1])


def _sort(random: Random, items: list[str]) -> Drawn:
    return _listed("Sort it.", "sorted", sorted(items, key=_order))


def _rotate(random: Random, items: list[str]) -> Drawn | None:
    if len(items) < 3:
        return None
    by = random.randint(1, min(3, len(items) - 1))
    return _listed(f"Rotate it left by {by}.", f"rotated by {by}", items[by:] + items[:by])


def _uppercase(random: Random, items: list[str]) -> Drawn | None:
    if _is_number(items) or any(item.isupper() for item in items):
        return None
    return _listed("Write it in capitals.", "capitals", [item.upper() for item in items])


def _dedupe(random: Random, items: list[str]) -> Drawn:
    return _listed("Remove repeats.", "without repeats", list(dict.fromkeys(items)))


def _swap(random: Random, items: list[str]) -> Drawn | None:
    if len(items) < 2:
        return None
    swapped = [items[-1], *items[1:-1], items[0]]
    return _listed("Swap the first and last item.", "swapped", swapped)


def _remove(random: Random, items: list[str]) -> Drawn | None:
    if len(items) < 2:
        return None
    item = random.choice(items)
    return _listed(f"Remove {item}.", f"without {item}", [i for i in items if i != item])


def _filter(random: Random, items: list[str]) -> Drawn | None:
    if not _is_number(items):
        return None
    bound = random.randint(2, 9) * 10
    kept = [item for item in items if int(item) > bound]
    return _listed(f"Keep numbers above {bound}.", f"above {bound}", kept)


def _item(random: Random, items: list[str]) -> Drawn | None:
    if not items:
        return None
    index = random.randint(1, len(items))
    steps = ", ".join(f"{i} {item}" for i, item in enumerate(items[:index], start=1))
    result = f"{steps}: {items[index - 1]}"
    return f"What is item {index}?", f"item {index}", result, items


def _count(random: Random, items: list[str]) -> Drawn | None:
    if not items:
        return None
    item, seen, steps = random.choice(items), 0, []
    for other in items:
        seen += other == item
        steps.append(f"{other} {seen}")
    return (
        f"How often is {item} in it?",
        f"count of {item}",
        f"{', '.join(steps)}: {seen}",
        items,
    )


def _length(random: Random, items: list[str]) -> Drawn | None:
    if not items:
        return None
    steps = ", ".join(f"{i} {item}" for i, item in enumerate(items, start=1))
    return "How many items are left?", "items", f"{steps}: {len(items)}", items


def _largest(random: Random, items: list[str]) -> Drawn | None:
    if not items or not _is_number(items):
        return None
    best, steps = items[0], []
    for item in items:
        best = max(best, item, key=int)
        steps.append(best)
    return "What is the largest?", "largest", f"{' '.join(steps)}: {best}", items


LIST_STEPS: dict[str, Callable[[Random, list[str]], Drawn | None]] = {
    "reverse": _reverse,
    "sort": _sort,
    "rotate": _rotate,
    "uppercase": _uppercase,
    "dedupe": _dedupe,
    "swap": _swap,
    "remove": _remove,
    "filter": _filter,
}
ANSWER_STEPS: dict[str, Callable[[Random, list[str]], Drawn | None]] = {
    "item": _item,
    "count": _count,
    "length": _length,
    "largest": _largest,
}
