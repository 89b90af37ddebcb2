"""A byte-level BPE tokenizer with single digits and the tokens of a conversation."""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    trainers,
)
from tokenizers.processors import TemplateProcessing

from vivace.training.corpus import read_corpus
from vivace.training.exercises import WORDS, make_exercise

__all__ = ["BEGIN", "CHAT_TEMPLATE", "END", "SPECIAL_TOKENS", "build_tokenizer", "token_id"]

BEGIN, END = "<|begin|>", "<|end|>"
SPECIAL_TOKENS = (BEGIN, END, "<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Words with their space, single digits, runs of signs, white space that leaves one for the word.
_PIECES = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_KINDS = ("arithmetic", "procedures", "recall", "copying", "chat")
_NUM_EXERCISES = 4_000  # of each of those, so that the exercises' own words become tokens


def build_tokenizer(vocab_size: int, seed: int) -> Tokenizer:
    """Train the tokenizer on the training split of the corpus and of the exercises."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    begin = token_id(tokenizer, BEGIN)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {BEGIN} $B",
        special_tokens=[(BEGIN, begin)],
    )
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must be there."""
    found = tokenizer.token_to_id(token)
    assert found is not None, f"the tokenizer lacks {token}"
    return found


def _texts(seed: int) -> Iterator[str]:
    for _, lines in read_corpus("train").documents:
        yield "\n".join(lines)
    for kind in _KINDS:
        for index in range(_NUM_EXERCISES):
            exercise = make_exercise(kind, 2 + index % 5, seed, index, "train")
            yield from (turn.text for turn in exercise.turns)
    # Each word of the exercises often enough to be one token, alone and after a space.
    for _ in range(300):
        yield " ".join(WORDS)
        yield "\n".join(WORDS)
