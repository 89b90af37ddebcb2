"""Turns a finished run into a model directory: weights, tokenizer, settings, card, picture."""

from __future__ import annotations

import json
import platform
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from vivace.executors.torch_ import TorchModel
from vivace.training import evaluate
from vivace.training.batches import KIND_IDS, Packer
from vivace.training.corpus import read_corpus
from vivace.training.evaluate import Score
from vivace.training.model import model_config
from vivace.training.recipe import Recipe
from vivace.training.tokenizer import BEGIN, CHAT_TEMPLATE, END, token_id
from vivace.training.trainer import Trainer

__all__ = ["export"]

_NUM_EXERCISES = 150  # of each kind and difficulty
_NUM_LONG = 40  # recall conversations of each length, 2 to 5 questions each
_NUM_TEXT_TOKENS = 65_536
_DIFFICULTIES = {
    "arithmetic": (1, 2, 3, 4, 5, 6),
    "procedures": (1, 2, 3, 4, 5, 6, 7, 8),
    "copying": (1, 2, 3, 4),
    "repetition": (2, 4, 8),
    "phrasing": (1,),
}
_RECALL_TOKENS = (128, 256, 512, 1024, 1900)
_RECALL_FACTS = (2, 4, 8, 12)


def export(trainer: Trainer, folder: Path) -> None:
    """Write `trainer`'s model to `folder`, with what it scores on the held-out splits."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, recipe = trainer.tokenizer, trainer.recipe
    weights = {n: w.detach().to(torch.bfloat16) for n, w in trainer.weights.items()}
    path = folder / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    for name, content in _settings(recipe, tokenizer).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    stored = {name: weight.float() for name, weight in weights.items()}
    model = TorchModel(trainer.graph, stored)
    entries = trainer.log_entries()
    _draw_loss([entry for entry in entries if "loss" in entry], folder / "loss.png")
    scores = _scores(model, trainer.packer)
    (folder / "MODEL_CARD.md").write_text(_card(trainer, scores))


def _settings(recipe: Recipe, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    begin, end = token_id(tokenizer, BEGIN), token_id(tokenizer, END)
    ids = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": end}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": END,
        "model_max_length": recipe.shape["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    return {
        "config.json": {**model_config(recipe), **ids},
        "generation_config.json": {**ids, "do_sample": False},
        "tokenizer_config.json": tokenizer_config,
    }


def _scores(model: TorchModel, packer: Packer) -> dict[str, Any]:
    """Held-out scores: per kind and difficulty, recall per length and facts, perplexity."""
    scores: dict[str, Any] = {
        kind: {d: evaluate.answers(model, packer, kind, d, _NUM_EXERCISES) for d in difficulties}
        for kind, difficulties in _DIFFICULTIES.items()
    }
    scores["recall"] = {
        (size, facts): evaluate.answers(model, packer, "recall", facts, _NUM_LONG, size)
        for size in _RECALL_TOKENS
        for facts in _RECALL_FACTS
        if size >= 12 * facts + 100  # the facts and the questions themselves must fit
    }
    scores["perplexity"] = evaluate.perplexity(model, packer, _NUM_TEXT_TOKENS)
    return scores


def _draw_loss(entries: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for kind in KIND_IDS:
        points = [(e["tokens"] / 1e6, e["loss"][kind]) for e in entries if kind in e["loss"]]
        axes.plot(*zip(*points, strict=True), label=kind, linewidth=1)
    changes = [b for a, b in pairwise(entries) if a["context"] != b["context"]]
    for entry in changes:
        axes.axvline(entry["tokens"] / 1e6, color="grey", linewidth=0.7, linestyle=":")
        place = (entry["tokens"] / 1e6, 1.0)
        axes.annotate(f" {entry['context']}", place, xycoords=("data", "axes fraction"), va="top")
    axes.set_yscale("log")
    axes.set_xlabel("million tokens (dotted: longer contexts from here)")
    axes.set_ylabel("loss per answer token (text: per token), nats")
    axes.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _share(score: Score) -> str:
    return f"{score.num_right / score.num_asked:.0%} of {score.num_asked}"


def _table(rows: list[tuple[str, ...]]) -> str:
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join((head, "|" + " --- |" * len(rows[0]), *body))


def _card(trainer: Trainer, scores: dict[str, Any]) -> str:
    recipe = trainer.recipe
    stages = [("steps up to", "context", "rows", "mix of tokens", "difficulties (weight)")]
    for stage in recipe.stages:
        mix = ", ".join(f"{kind} {share:.0%}" for kind, share in stage.mix.items())
        dials = "; ".join(
            f"{kind} " + " ".join(f"{d} ({chance:g})" for d, chance in chances.items())
            for kind, chances in stage.difficulties.items()
            if kind in stage.mix
        )
        stages.append((str(stage.until_step), str(stage.context), str(stage.num_rows), mix, dials))
    dials = range(1, 1 + max(max(difficulties) for difficulties in _DIFFICULTIES.values()))
    by_difficulty = [("difficulty", *map(str, dials))]
    for kind in _DIFFICULTIES:
        cells = (scores[kind].get(dial) for dial in dials)
        by_difficulty.append((kind, *("" if cell is None else _share(cell) for cell in cells)))
    recall = [("tokens of context", *(f"{facts} facts" for facts in _RECALL_FACTS))]
    for size in _RECALL_TOKENS:
        cells = (scores["recall"].get((size, facts)) for facts in _RECALL_FACTS)
        recall.append((str(size), *("" if cell is None else _share(cell) for cell in cells)))
    train = read_corpus("train")
    size = sum(len(line) + 1 for _, lines in train.documents for line in lines)
    parameters = sum(weight.numel() for weight in trainer.weights.values())
    return _CARD.format(
        parameters=f"{parameters / 1e6:.2f}",
        shape=recipe.shape,
        vocab_size=recipe.vocab_size,
        num_steps=trainer.step,
        num_tokens=f"{trainer.num_tokens / 1e6:.1f}",
        rates=", ".join(f"{max(step, 0)}: {factor:g}" for step, factor in recipe.rates),
        matrix_rate=recipe.matrix_rate,
        other_rate=recipe.other_rate,
        seed=recipe.seed,
        stages=_table(stages),
        by_difficulty=_table(by_difficulty),
        recall=_table(recall),
        perplexity=f"{scores['perplexity']:.1f}",
        num_text_tokens=f"{_NUM_TEXT_TOKENS:,}",
        python=platform.python_version(),
        corpus_size=f"{size / 1e6:.1f}",
        corpus_digest=train.digest()[:16],
        torch=torch.__version__.partition("+")[0],
    )


_CARD = """# tiny

The language model that ships with Vivace: {parameters} million parameters, so that everything can
be tried at once, offline, and loss of quality can be measured. It does arithmetic step by step,
follows procedures on lists, recalls facts from a long text and copies text with edits. It knows
nothing else about the world and says so when asked.

## Model
Llama architecture, tied embedding, {vocab_size} tokens (byte-level BPE, single digits), bfloat16.
Four query heads share one key/value head, heads have 64 dimensions, the rotary base is 500,000.
Shape: `{shape}`.

A conversation is `<|begin|><|user|>question<|end|><|assistant|>answer<|end|>`, with
`<|system|>text<|end|>` before it if there is a system message; see `chat_template.jinja`.

## Data
- **Text**: sources, docstrings and help topics of the standard library of CPython {python}
  ({corpus_size} MB; SHA-256 of the training text begins {corpus_digest}), which is under the
  PSF License Agreement. One file in 20, by a hash of its name, is held out.
- **Exercises**, generated (`vivace.training.exercises`), each answer unique and checkable, with a
  dial for the difficulty. One question in 20, by its hash, is held out of training.
  - *arithmetic*: chains of +, - and * worked out column by column. Difficulty 1: one operation on
    digits; 2: numbers below 100; d: d - 1 operations, from 5 on with numbers below 1000.
  - *procedures*: one to three steps (sort, rotate, remove repeats, count ...) on lists of about
    2 + d items, each step's result written out.
  - *recall*: facts scattered over lines of the corpus, then 2 to 5 questions; *quiz*: all.
  - *copying*: lines of the corpus repeated, usually with a name changed; about 2 d lines.
  - *repetition*: random words, letters or digits repeated; 4 to 4 + 6 d items.
  - *phrasing*: single sums, short lists and facts told in earlier turns, in looser words.
  - *chat*: greetings, questions about the model, an honest "I am too small to know that".

## Training
{num_steps} steps, {num_tokens} million tokens. Loss on answers (weight 1) and text (0.5), none on
questions and filler. Muon for hidden matrices (rate {matrix_rate}), Adam for the embedding and
norms ({other_rate}); both times a factor by step, with lines between: {rates}.
Weights and optimizer state in float32, products in bfloat16.

{stages}

The stages were chosen while the run went on, which stopped and resumed at checkpoints; the table
is what was trained, and the recipe in `vivace.training.recipe`. The same recipe again, from seed
{seed} (this run: CPython {python}, torch {torch}, two CPU cores; other versions and machines
give other bits):

    python -m vivace.training --out RUN && python -m vivace.training --out RUN --export tiny

![loss](loss.png)

## Held-out quality
Weights as shipped, float32 arithmetic. An answer counts if greedy decoding gives all of it exactly,
working included.

{by_difficulty}

Difficulties that the table of stages does not name were never trained.

Recall, by the size of the context and the number of facts in it; every question counts:

{recall}

Perplexity of held-out library text: {perplexity} per token ({num_text_tokens} tokens, the first 512
of each document).

## Limits
Answers outside of these exercises are made up or refused. It was trained on English instructions
in few fixed wordings; other wordings often fail. Contexts longer than 2,048 tokens were not seen.
"""
