"""Held-out quality: perplexity of text, and how many answers greedy decoding gets wholly right."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vivace.executors.torch_ import TorchModel, dense_causal_attend
from vivace.training.batches import Packer
from vivace.training.corpus import read_corpus
from vivace.training.exercises import make_exercise

__all__ = ["Score", "answers", "perplexity"]

_SEED = 7


@dataclass(frozen=True)
class Score:
    """Answers right of those asked, and the share of their tokens that is right."""

    num_right: int
    num_asked: int
    token_share: float

    def __str__(self) -> str:
        return f"{self.num_right}/{self.num_asked} ({self.token_share:.3f})"


@torch.no_grad()
def answers(
    model: TorchModel,
    packer: Packer,
    kind: str,
    difficulty: int,
    num_exercises: int,
    num_tokens: int = 96,
) -> Score:
    """Score held-out exercises by teacher forcing.

    Each answer has one right form, so it is what greedy decoding would write exactly if the
    likeliest token is the right one at each of its places. Every answer of a conversation counts.
    """
    right = asked = tokens_right = tokens = 0
    for index in range(num_exercises):
        exercise = make_exercise(kind, difficulty, _SEED, index, "heldout", num_tokens)
        ids, weights = packer.encode(exercise)
        if len(ids) > model.graph.max_positions:
            continue
        rows = torch.tensor(ids)
        is_answer = np.asarray(weights[1:]) == 1.0
        hidden = _hidden(model, rows[:-1])[torch.from_numpy(is_answer)]
        hits = (model.logits(hidden).argmax(-1) == rows[1:][torch.from_numpy(is_answer)]).numpy()
        places = np.flatnonzero(is_answer)
        for answer in np.split(hits, np.flatnonzero(np.diff(places) > 1) + 1):
            right += bool(answer.all())
            asked += 1
        tokens_right += int(hits.sum())
        tokens += hits.size
    return Score(right, asked, tokens_right / max(1, tokens))


@torch.no_grad()
def perplexity(model: TorchModel, packer: Packer, num_tokens: int, context: int = 512) -> float:
    """Perplexity per token of held-out text, in windows of `context` tokens."""
    total, count = 0.0, 0
    for _, lines in read_corpus("heldout").documents:
        ids = packer.tokenizer.encode("\n".join(lines), add_special_tokens=False).ids
        rows = torch.tensor([packer.begin, *ids[:context]])
        logits = model.logits(_hidden(model, rows[:-1])).float()
        total += torch.nn.functional.cross_entropy(logits, rows[1:], reduction="sum").item()
        count += len(rows) - 1
        if count >= num_tokens:
            break
    return float(np.exp(total / count))


def _hidden(model: TorchModel, token_ids: Tensor) -> Tensor:
    positions = torch.arange(len(token_ids))
    return model.forward(model.embed(token_ids, positions), positions, dense_causal_attend(1))
