"""The recipe of the default model: its shape, its stages, its optimizer's dials."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["TINY", "TOY", "Recipe", "Stage"]


@dataclass(frozen=True)
class Stage:
    """Part of a run: rows of one context, one mix of kinds (shares of the tokens)."""

    until_step: int
    context: int
    num_rows: int
    mix: dict[str, float]
    difficulties: dict[str, dict[int, float]]  # per kind: difficulty -> chance


@dataclass(frozen=True)
class Recipe:
    """Everything a training run depends on besides the machine's Python and torch."""

    stages: tuple[Stage, ...]
    rates: tuple[tuple[int, float], ...]  # (step, factor of both rates), lines between
    seed: int = 1
    vocab_size: int = 4096
    matrix_rate: float = 0.02  # Muon, hidden matrices
    other_rate: float = 3e-3  # AdamW, embedding and norms
    shape: dict[str, Any] = field(
        default_factory=lambda: {
            "hidden_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "intermediate_size": 768,
            "max_position_embeddings": 2048,
            "rope_theta": 500000.0,
            "rms_norm_eps": 1e-5,
        }
    )

    @property
    def num_steps(self) -> int:
        return self.stages[-1].until_step

    def stage(self, step: int) -> Stage:
        """The stage that `step` (from 0) belongs to."""
        return next(stage for stage in self.stages if step < stage.until_step)

    def rate(self, step: int) -> float:
        """What both rates are multiplied with: warm-up, constant, decay."""
        steps, factors = zip(*self.rates, strict=True)
        return float(np.interp(step, steps, factors))


_FIRST_MIX = {
    "text": 0.12, "recall": 0.28, "arithmetic": 0.25, "procedures": 0.20, "copying": 0.13,
    "chat": 0.02,
}  # fmt: skip
_SECOND_MIX = {
    "text": 0.10, "recall": 0.30, "arithmetic": 0.12, "procedures": 0.22, "copying": 0.13,
    "repetition": 0.11, "chat": 0.02,
}  # fmt: skip
_THIRD_MIX = {
    "text": 0.15, "recall": 0.30, "arithmetic": 0.13, "procedures": 0.23, "copying": 0.10,
    "repetition": 0.03, "phrasing": 0.04, "chat": 0.02,
}  # fmt: skip
_FOURTH_MIX = {
    "text": 0.08, "recall": 0.08, "quiz": 0.28, "arithmetic": 0.14, "procedures": 0.31,
    "copying": 0.05, "repetition": 0.01, "phrasing": 0.03, "chat": 0.02,
}  # fmt: skip
_LAST_MIX = {
    "text": 0.16, "recall": 0.06, "quiz": 0.12, "arithmetic": 0.16, "procedures": 0.34,
    "copying": 0.09, "repetition": 0.02, "phrasing": 0.03, "chat": 0.02,
}  # fmt: skip
_EASY = {
    "arithmetic": {1: 0.35, 2: 0.35, 3: 0.20, 4: 0.10},
    "repetition": {1: 0.5, 2: 0.3, 4: 0.2},
    "procedures": {1: 0.30, 2: 0.30, 3: 0.20, 4: 0.20},
    "recall": {2: 0.3, 3: 0.3, 4: 0.2, 6: 0.2},
    "copying": {1: 0.4, 2: 0.4, 3: 0.2},
}
_FULL = {
    "arithmetic": {1: 0.15, 2: 0.25, 3: 0.25, 4: 0.20, 5: 0.15},
    "procedures": {1: 0.15, 2: 0.20, 3: 0.20, 4: 0.20, 5: 0.15, 6: 0.10},
    "recall": {2: 0.2, 3: 0.2, 4: 0.2, 6: 0.2, 8: 0.1, 12: 0.1},
    "copying": {1: 0.3, 2: 0.3, 3: 0.2, 4: 0.2},
    "repetition": {2: 0.4, 4: 0.4, 8: 0.2},
    "quiz": {4: 0.3, 8: 0.4, 12: 0.3},
}

TINY = Recipe(
    stages=(
        Stage(500, 256, 24, _FIRST_MIX, _EASY),
        Stage(1000, 256, 24, _SECOND_MIX, _EASY),
        Stage(1250, 512, 12, _THIRD_MIX, _FULL),
        Stage(1650, 1024, 6, _FOURTH_MIX, _FULL),
        Stage(2170, 1024, 6, _LAST_MIX, _FULL),
        Stage(2350, 2048, 3, _LAST_MIX, _FULL),
    ),
    rates=(
        (-1, 0.0),
        (99, 1.0),
        (1300, 1.0),
        (1400, 0.667),
        (1520, 0.667),
        (1650, 0.357),
        (1950, 0.357),
        (2350, 0.0),
    ),
)

TOY = Recipe(
    stages=(Stage(3, 64, 2, _FIRST_MIX, _EASY), Stage(6, 128, 2, _FIRST_MIX, _EASY)),
    rates=((-1, 0.0), (1, 1.0), (4, 1.0), (6, 0.0)),
    vocab_size=512,
    shape=TINY.shape | {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96,
                        "head_dim": 16, "max_position_embeddings": 128},
)  # fmt: skip
