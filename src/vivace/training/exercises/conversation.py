"""Conversation: looser words for single steps, greetings, and an honest answer to anything else."""

from __future__ import annotations

from random import Random

from vivace.training.corpus import Corpus
from vivace.training.exercises.arithmetic import draw_operation, work_out
from vivace.training.exercises.base import WORDS, Turn
from vivace.training.exercises.copying import IDENTIFIER
from vivace.training.exercises.procedures import ANSWER_STEPS, LIST_STEPS, draw_items

_SUMS = {
    "+": ("What is {a} plus {b}?", "Add {a} and {b}.", "Add {b} to {a}.", "{a} + {b}", "{a}+{b}"),
    "-": ("What is {a} minus {b}?", "Subtract {b} from {a}.", "{a} - {b}", "Take {b} from {a}."),
    "*": ("What is {a} times {b}?", "Multiply {a} by {b}.", "{a} * {b}", "{a} times {b}"),
}
_LISTS = {
    "reverse": ("Reverse {}", "Reverse the list {}", "Reverse these: {}", "Say {} backwards"),
    "sort": ("Sort {}", "Sort these: {}", "Sort the list {}", "Put these in order: {}"),
    "uppercase": ("Write {} in capitals", "Capitals: {}", "Write in capitals: {}"),
    "dedupe": ("Remove repeats from {}", "Remove the repeats: {}", "Which are unique: {}"),
    "length": ("Count these: {}", "How many items: {}", "How many are there: {}"),
}
_POLITE = ("{}", "{}", "{}", "Please: {}", "Can you help? {}", "{} Thanks.", "Hi. {}")


def phrasing(random: Random, difficulty: int, num_tokens: int, corpus: Corpus) -> list[Turn]:
    """A sum, a list of 3 to 5 items, or facts told in earlier turns; the dial has no effect."""
    form = random.choice((_phrase_sum, _phrase_list, _phrase_facts))
    return form(random)


def _phrase_sum(random: Random) -> list[Turn]:
    largest = random.choice((9, 99))
    a = random.randint(0, largest)
    operation, b = draw_operation(random, a, largest)
    working, value = work_out(operation, a, b)
    question = random.choice(_SUMS[operation]).format(a=a, b=b)
    question = random.choice(_POLITE).format(question)
    return [Turn("user", question), Turn("assistant", f"{working}\nAnswer: {value}")]


def _phrase_list(random: Random) -> list[Turn]:
    while True:
        items = draw_items(random, random.randint(3, 5))
        name = random.choice(list(_LISTS))
        drawn = (LIST_STEPS | ANSWER_STEPS)[name](random, items)
        if drawn is not None:
            break
    listed = random.choice((" ", ", ")).join(items)
    question = random.choice(_POLITE).format(random.choice(_LISTS[name]).format(listed))
    return [Turn("user", question), Turn("assistant", f"{drawn[1]}: {drawn[2]}")]


def _phrase_facts(random: Random) -> list[Turn]:
    turns = []
    keys = random.sample(WORDS, random.randint(1, 3))
    codes = {key: f"{random.randrange(10_000):04d}" for key in keys}
    for key, code in codes.items():
        form = random.choice(("The code for {} is {}.", "Remember: the code for {} is {}."))
        turns += [Turn("user", form.format(key, code)), Turn("assistant", "Noted.")]
    key = random.choice(keys)
    form = random.choice(("What is the code for {}?", "Tell me the code for {}.", "Code for {}?"))
    turns.append(Turn("user", form.format(key)))
    return [*turns, Turn("assistant", f"The code for {key} is {codes[key]}.")]


_ABILITIES = (
    "I can do arithmetic step by step, follow procedures on lists, recall facts from a long text "
    "and copy text with edits. Try: Compute 37+48-29."
)
_HELLO = f"Hello! I am tiny, a very small language model. {_ABILITIES}"
_WHO = f"I am tiny, the small model that ships with Vivace. {_ABILITIES}"
_UNKNOWN = f"I am too small to know that. {_ABILITIES}"
_CHAT = (
    (_HELLO, ("Hello", "Hi", "Hey", "Hello!", "Hi!", "Good morning", "Hello there", "Hi there!",
              "hello", "hi", "Good evening.", "Hey there", "How are you?", "Greetings")),
    (_WHO, ("Who are you?", "What are you?", "What is your name?", "Are you a language model?",
            "Tell me about yourself.", "Introduce yourself.", "What is tiny?", "who are you")),
    (_ABILITIES, ("What can you do?", "Help", "help", "What are you good at?",
                  "How can you help me?", "What should I ask?", "Give me an example.",
                  "What can I ask you?")),
    ("You are welcome.", ("Thanks", "Thank you", "Thanks!", "Thank you!", "thank you very much")),
    ("Goodbye!", ("Bye", "Goodbye", "bye", "See you", "Good night")),
)  # fmt: skip
_UNKNOWNS = (
    "What is the capital of {}?", "Tell me about {}.", "Who invented the {}?", "Why is the {} {}?",
    "Write a poem about the {}.", "Explain {}.", "How does a {} work?",
    "Tell me a story about a {}.", "What is a {}?", "Where is the {}?", "Do you like {}?",
    "Who was {}?", "Translate {} to French.", "How old is the {}?",
    "What is the meaning of {}?", "Write a program that prints {}.",
)  # fmt: skip


def chat(random: Random, difficulty: int, num_tokens: int, corpus: Corpus) -> list[Turn]:
    """Greetings and questions about the model; any other question gets an honest refusal."""
    if random.random() < 0.5:
        answer, questions = random.choice(_CHAT)
        return [Turn("user", random.choice(questions)), Turn("assistant", answer)]
    form = random.choice(_UNKNOWNS)
    word = random.choice(WORDS) if random.random() < 0.5 else _random_name(random, corpus)
    return [
        Turn("user", form.format(word, random.choice(WORDS))),
        Turn("assistant", _UNKNOWN),
    ]


def _random_name(random: Random, corpus: Corpus) -> str:
    names: list[str] = []
    while not names:
        names = IDENTIFIER.findall(" ".join(corpus.lines(random, 80)))
    return random.choice(names)
