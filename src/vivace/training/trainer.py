"""The training loop: deterministic from the recipe's seed, and resumable at any checkpoint."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from vivace.executors.torch_ import TorchModel, dense_causal_attend
from vivace.models import graph_from_config
from vivace.models.config import Config
from vivace.training import evaluate
from vivace.training.batches import KIND_IDS, Batch, Packer
from vivace.training.model import initial_weights, model_config
from vivace.training.optimizer import Optimizer
from vivace.training.recipe import Recipe
from vivace.training.tokenizer import build_tokenizer

__all__ = ["Trainer"]


class Trainer:
    """One run in one folder: tokenizer.json, checkpoint.safetensors, log.jsonl."""

    def __init__(self, recipe: Recipe, folder: Path, is_resumed: bool) -> None:
        self.recipe = recipe
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = self._tokenizer()
        self.packer = Packer(self.tokenizer, recipe.seed)
        self.graph = graph_from_config(Config(model_config(recipe), "recipe"))
        self.weights = initial_weights(self.graph, recipe.seed)
        for weight in self.weights.values():
            weight.requires_grad_(True)
        self.model = TorchModel(self.graph, self.weights)
        hidden = {ref.name for ref in self.graph.linears()} - {self.graph.embedding.weight.name}
        self.optimizer = Optimizer(self.weights, hidden)
        self.step = self.num_tokens = 0
        if is_resumed and self._checkpoint_path.exists():
            self._load()
        else:
            self._log_path.unlink(missing_ok=True)

    @property
    def _checkpoint_path(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    @property
    def _log_path(self) -> Path:
        return self.folder / "log.jsonl"

    def run(
        self,
        until_step: int | None = None,
        log_every: int = 20,
        save_every: int = 50,
        check_every: int = 250,
    ) -> None:
        """Train to `until_step` (the recipe's end by default), then save. 0: never before."""
        last = self.recipe.num_steps if until_step is None else until_step
        started, sums = time.monotonic(), np.zeros((len(KIND_IDS), 2))
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(self._batch, self.step)
            while self.step < last:
                batch = pending.result()
                if self.step + 1 < last:
                    pending = pool.submit(self._batch, self.step + 1)
                sums += self.learn(batch)
                self.step += 1
                self.num_tokens += batch.weights.size
                if self.step % log_every == 0:
                    seconds = time.monotonic() - started
                    self._log(self._progress(sums, seconds / log_every))
                    started, sums = time.monotonic(), np.zeros_like(sums)
                if self.step == last or (save_every and self.step % save_every == 0):
                    self.save()
                if check_every and self.step % check_every == 0:
                    self._log({"step": self.step, "heldout": self.check()})
                    started = time.monotonic()

    def loss(self, batch: Batch) -> tuple[Tensor, np.ndarray]:
        """The weighted mean loss of a batch, and (sum, count) of the loss per kind."""
        num_rows, context = batch.weights.shape
        tokens = torch.from_numpy(batch.tokens)
        positions = torch.arange(context).repeat(num_rows)
        weights = torch.from_numpy(batch.weights).flatten()
        wanted = weights > 0
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.model.embed(tokens[:, :-1].flatten(), positions)
            hidden = self.model.forward(hidden, positions, dense_causal_attend(num_rows))
            logits = self.model.logits(hidden[wanted])
        targets = tokens[:, 1:].flatten()[wanted]
        losses = functional.cross_entropy(logits.float(), targets, reduction="none")
        weights = weights[wanted]
        sums = np.zeros((len(KIND_IDS), 2))
        full = weights >= 0.5  # text and answers, not the words of questions
        kinds = torch.from_numpy(batch.kinds).flatten()[wanted][full].numpy()
        np.add.at(
            sums,
            kinds,
            np.stack((losses.detach()[full].numpy(), np.ones(len(kinds))), 1),
        )
        return (losses * weights).sum() / weights.sum(), sums

    def check(self) -> dict[str, Any]:
        """A quick look at held-out quality: a few exercises of every kind."""
        asked = {
            "arithmetic": ((1, 96), (2, 96), (3, 96), (5, 96)),
            "procedures": ((1, 96), (2, 96), (4, 96), (6, 96)),
            "recall": ((4, 200), (4, 450), (4, 950), (4, 1900)),
            "copying": ((2, 96),),
            "repetition": ((2, 96),),
            "phrasing": ((1, 96),),
        }
        longest = max(stage.context for stage in self.recipe.stages)
        found: dict[str, Any] = {}
        with torch.autocast("cpu", torch.bfloat16):
            for kind, cases in asked.items():
                for difficulty, size in cases:
                    if size > longest:
                        continue
                    num = 40 if size < 200 else 12
                    score = evaluate.answers(self.model, self.packer, kind, difficulty, num, size)
                    found[f"{kind}/{size if kind == 'recall' else difficulty}"] = str(score)
            found["perplexity"] = round(evaluate.perplexity(self.model, self.packer, 8192), 2)
        return found

    def save(self) -> None:
        """Write weights, optimizer state and progress as one file, at once."""
        tensors = {f"weights.{name}": weight.detach() for name, weight in self.weights.items()}
        tensors |= {f"optimizer.{name}": value for name, value in self.optimizer.state.items()}
        progress = {"step": self.step, "num_tokens": self.num_tokens}
        partial = self._checkpoint_path.with_suffix(".partial")
        save_file(tensors, partial, metadata={"progress": json.dumps(progress)})
        os.replace(partial, self._checkpoint_path)

    def log_entries(self) -> list[dict[str, Any]]:
        """What the run has logged: progress with losses, and quick held-out checks."""
        return [json.loads(line) for line in self._log_path.read_text().splitlines()]

    def _batch(self, step: int) -> Batch:
        return self.packer.batch(self.recipe.stage(step), step)

    def learn(self, batch: Batch) -> np.ndarray:
        """One step on a batch; returns (sum, count) of the loss per kind."""
        loss, sums = self.loss(batch)
        loss.backward()
        rate = self.recipe.rate(self.step)
        self.optimizer.step(
            self.step, self.recipe.matrix_rate * rate, self.recipe.other_rate * rate
        )
        return sums

    def _progress(self, sums: np.ndarray, step_seconds: float) -> dict[str, Any]:
        stage = self.recipe.stage(self.step - 1)
        return {
            "step": self.step,
            "tokens": self.num_tokens,
            "context": stage.context,
            "rate": round(self.recipe.rate(self.step - 1), 4),
            "tokens_per_second": round(stage.num_rows * stage.context / step_seconds),
            "loss": {
                kind: round(sums[i, 0] / sums[i, 1], 4)
                for kind, i in KIND_IDS.items()
                if sums[i, 1]
            },
        }

    def _log(self, entry: dict[str, Any]) -> None:
        with self._log_path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def _load(self) -> None:
        with safe_open(self._checkpoint_path, framework="pt") as file:
            progress = json.loads(file.metadata()["progress"])
            with torch.no_grad():
                for name, weight in self.weights.items():
                    weight.copy_(file.get_tensor(f"weights.{name}"))
                for name, value in self.optimizer.state.items():
                    value.copy_(file.get_tensor(f"optimizer.{name}"))
        self.step, self.num_tokens = progress["step"], progress["num_tokens"]
        if self._log_path.exists():  # what was logged after the checkpoint happens again
            kept = [entry for entry in self.log_entries() if entry["step"] <= self.step]
            self._log_path.write_text("".join(json.dumps(entry) + "\n" for entry in kept))

    def _tokenizer(self) -> Tokenizer:
        path = self.folder / "tokenizer.json"
        if not path.exists():
            build_tokenizer(self.recipe.vocab_size, self.recipe.seed).save(str(path))
        return Tokenizer.from_file(str(path))
