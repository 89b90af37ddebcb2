"""Muon for the hidden matrices, AdamW's rule for everything else."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Optimizer"]

_MOMENTUM = 0.95
_BETAS = (0.9, 0.95)
_EPS = 1e-8
_MATRIX_DECAY = 0.02  # decoupled weight decay of matrices, times the rate


class Optimizer:
    """Updates named weights in place from their gradients.

    A hidden matrix moves by its momentum made orthogonal: five Newton-Schulz steps send all
    singular values near 1, so every direction learns at the same pace (Muon, Jordan et al. 2024,
    kellerjordan.github.io/posts/muon). Matrices of one shape are handled as one batch.
    The embedding and the norms follow Adam (Kingma and Ba, 2014, 1412.6980).
    """

    def __init__(self, weights: dict[str, Tensor], is_matrix: set[str]) -> None:
        self.weights = weights
        self.matrices: dict[tuple[int, ...], list[str]] = {}
        for name in sorted(is_matrix):
            self.matrices.setdefault(tuple(weights[name].shape), []).append(name)
        self.others = sorted(set(weights) - is_matrix)
        self.state: dict[str, Tensor] = {}
        for name in sorted(weights):
            for part in ("momentum",) if name in is_matrix else ("mean", "square"):
                self.state[f"{name}.{part}"] = torch.zeros_like(weights[name])

    @torch.no_grad()
    def step(self, step: int, matrix_rate: float, other_rate: float) -> None:
        """Apply the gradients of `step` (from 0) and clear them."""
        for names in self.matrices.values():
            directions = []
            for name in names:
                gradient = self._gradient(name)
                momentum = self.state[f"{name}.momentum"].lerp_(gradient, 1 - _MOMENTUM)
                directions.append(gradient.lerp(momentum, _MOMENTUM))  # Nesterov
            updates = _orthogonal(torch.stack(directions))
            for name, update in zip(names, updates, strict=True):
                weight = self.weights[name]
                scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.mul_(1 - matrix_rate * _MATRIX_DECAY)
                weight.add_(update.to(weight.dtype), alpha=-matrix_rate * scale)
        for name in self.others:
            weight = self.weights[name]
            gradient = self._gradient(name)
            mean = self.state[f"{name}.mean"].lerp_(gradient, 1 - _BETAS[0])
            square = self.state[f"{name}.square"].lerp_(gradient.square(), 1 - _BETAS[1])
            mean = mean / (1 - _BETAS[0] ** (step + 1))
            square = square / (1 - _BETAS[1] ** (step + 1))
            weight.sub_(other_rate * mean / (square.sqrt() + _EPS))
        for weight in self.weights.values():
            weight.grad = None

    def _gradient(self, name: str) -> Tensor:
        gradient = self.weights[name].grad
        assert gradient is not None, f"{name} took no part in the loss"
        return gradient


def _orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrices with singular values near 1: [batch, rows, columns]."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if is_tall else matrices).to(torch.bfloat16)
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(x.dtype)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if is_tall else x
