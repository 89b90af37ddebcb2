"""Routing and combining of experts in torch against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="the torch executor needs the torch extra")

from vivace.blocks import (  # noqa: E402
    Activation,
    Expert,
    ExpertsBlock,
    LinearSpec,
    Routing,
    WeightRef,
)
from vivace.executors.torch_experts import combine_experts, route  # noqa: E402


def _spec(name: str) -> LinearSpec:
    return LinearSpec(1, (WeightRef(name, (1, 1)),), (None,))


def _block(num_experts: int, num_active: int, routing: Routing, jitter: float = 0.0):
    experts = tuple(Expert(_spec(f"up{i}"), _spec(f"down{i}")) for i in range(num_experts))
    return ExpertsBlock(
        layer=0,
        router=_spec("router"),
        experts=experts,
        num_active=num_active,
        activation=Activation.SILU,
        norm=None,
        routing=routing,
        jitter=jitter,
    )


def _route(block: ExpertsBlock, logits: list[float]) -> tuple[list[int], list[float]]:
    chosen, weights = route(block, torch.tensor([logits]))
    return chosen[0].tolist(), weights[0].tolist()


def _shares(logits: list[float]) -> list[float]:
    total = sum(math.exp(item) for item in logits)
    return [math.exp(item) / total for item in logits]


def test_softmax_over_all_or_over_the_chosen() -> None:
    logits = [0.5, 2.0, -1.0, 1.0]
    chosen, weights = _route(_block(4, 2, Routing.SOFTMAX), logits)
    assert chosen == [1, 3]
    everyone = _shares(logits)
    assert weights == pytest.approx([everyone[1], everyone[3]])
    chosen, weights = _route(_block(4, 2, Routing.SOFTMAX_CHOSEN), logits)
    assert chosen == [1, 3]
    assert weights == pytest.approx(_shares([2.0, 1.0]))


@pytest.mark.parametrize("routing", Routing)
def test_the_lower_expert_wins_a_tie(routing) -> None:
    assert _route(_block(5, 3, routing), [1.0, 2.0, 1.0, 2.0, 1.0])[0] == [1, 3, 0]


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        # 1.9 is near 2.0 (0.05 of it), 1.0 is not; of the rest, nothing is near 1.9.
        ([1.0, 2.0, 1.9, -3.0], [_shares([2.0, 1.9])[0], 1.0]),
        # Below zero the distance is measured by the other's size: 0.1 / 1.1.
        ([-5.0, -1.1, -1.0], [_shares([-1.0, -1.1])[0], 1.0]),
        ([0.0, 0.0, 0.0, 0.0], [1 / 4, 1 / 3]),
    ],
)
def test_sparse_mixer(logits, expected) -> None:
    weights = _route(_block(len(logits), 2, Routing.SPARSE_MIXER, jitter=0.1), logits)[1]
    assert weights == pytest.approx(expected)


def test_outputs_are_added_in_rank_order() -> None:
    block = _block(3, 3, Routing.SOFTMAX_CHOSEN)
    values = dict(zip(block.experts, (1e8, 1.0, -1e8), strict=True))

    def run(expert: Expert, rows):
        return torch.full_like(rows, values[expert])

    near = 1e-6  # decides the order, and next to nothing about the weights
    sums = []
    for logits in ([2 * near, near, 0.0], [2 * near, 0.0, near], [0.0, 2 * near, near]):
        weights = route(block, torch.tensor([logits]))[1][0]
        order = sorted(range(3), key=lambda index: -logits[index])
        expected = torch.zeros(1)
        for weight, index in zip(weights, order, strict=True):
            expected = expected + weight * values[block.experts[index]]
        got = combine_experts(block, torch.zeros(1, 1), torch.tensor([logits]), run)
        assert got.item() == expected.item()
        sums.append(got.item())
    assert len(set(sums)) > 1


def test_rows_meet_their_own_experts_only_and_gradients_follow() -> None:
    block = _block(4, 1, Routing.SOFTMAX)
    scales = torch.tensor([1.0, 10.0, 100.0, 1000.0], requires_grad=True)
    logits = torch.tensor([[9.0, 0, 0, 0], [0, 0, 9.0, 0]], requires_grad=True)
    seen: dict[int, int] = {}

    def run(expert: Expert, rows):
        index = block.experts.index(expert)
        seen[index] = len(rows)
        return rows * scales[index]

    out = combine_experts(block, torch.ones(2, 1), logits, run)
    share = _shares([9.0, 0, 0, 0])[0]
    assert out.flatten().tolist() == pytest.approx([share, 100 * share])
    assert seen == {0: 1, 2: 1}
    out.sum().backward()
    assert scales.grad is not None
    assert (scales.grad != 0).tolist() == [True, False, True, False]
    assert logits.grad is not None
    assert (logits.grad != 0).all()
