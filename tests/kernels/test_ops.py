"""Row operations against numpy over odd sizes, with equal bits on every instruction set."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from vivace import _native

ISAS = _native.isa_names()
SIZES = [1, 7, 16, 17, 63, 64, 65, 80, 200, 1000]


def same_on_all(call: Callable[[str], np.ndarray]) -> np.ndarray:
    """The result, after checking that every instruction set gives the same bits."""
    first, *rest = (call(isa) for isa in ISAS)
    assert all(other.tobytes() == first.tobytes() for other in rest)
    return first


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_norm(size: int, kind: str, has_bias: bool) -> None:
    x, weight, bias = normal(1, 3, size) * 5 + 2, normal(2, size), normal(3, size)
    eps = 1e-5
    got = same_on_all(
        lambda isa: _native.norm(x, kind, weight, bias if has_bias else None, eps, isa)
    )
    wide = x.astype(np.float64)
    if kind == "layer":
        wide = wide - wide.mean(1, keepdims=True)
    wanted = wide / np.sqrt((wide**2).mean(1, keepdims=True) + eps) * weight + has_bias * bias
    tolerance = 1e-5 if size > 1 else 1e-3  # a single value is its own mean
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("is_interleaved", [False, True])
def test_rotate(size: int, is_interleaved: bool) -> None:
    heads, angle = normal(1, 2, 2 * size + 3), normal(2, size) * 3
    cos, sin = np.cos(angle), np.sin(angle)
    got = same_on_all(lambda isa: _native.rotate(heads, cos, sin, is_interleaved, isa))
    a = heads[:, 0 : 2 * size : 2] if is_interleaved else heads[:, :size]
    b = heads[:, 1 : 2 * size : 2] if is_interleaved else heads[:, size : 2 * size]
    turned = (a + 1j * b) * np.exp(1j * angle.astype(np.float64))
    axis = 2 if is_interleaved else 1
    wanted = np.stack([turned.real, turned.imag], axis).reshape(2, 2 * size)
    np.testing.assert_allclose(got[:, : 2 * size], wanted, atol=2e-6)
    np.testing.assert_array_equal(got[:, 2 * size :], heads[:, 2 * size :])


ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: 0.5 * x * math.erfc(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "relu": lambda x: max(x, 0.0),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    gate = np.concatenate(
        [np.linspace(-30, 30, 6001), np.logspace(-30, 0, 100), -np.logspace(-30, 0, 100)]
    ).astype(np.float32)
    got = same_on_all(lambda isa: _native.activate(name, gate, None, isa))
    wanted = np.array([ACTIVATIONS[name](float(x)) for x in gate])
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)
    up = normal(4, len(gate))
    gated = same_on_all(lambda isa: _native.activate(name, gate, up, isa))
    np.testing.assert_array_equal(gated, got * up)


@pytest.mark.parametrize("size", SIZES)
def test_soft_cap(size: int) -> None:
    x = normal(1, size) * 40
    got = same_on_all(lambda isa: _native.soft_cap(x, 30.0, 0.5, isa))
    np.testing.assert_allclose(got, 15 * np.tanh(x.astype(np.float64) / 30), rtol=1e-6)
    plain = same_on_all(lambda isa: _native.soft_cap(x, 0.0, 0.5, isa))
    np.testing.assert_array_equal(plain, x * np.float32(0.5))


def test_tanh_is_accurate_relative_to_itself() -> None:
    x = np.concatenate([np.logspace(-30, 2, 5000), [0.0]]).astype(np.float32)
    x = np.concatenate([x, -x])
    got = same_on_all(lambda isa: _native.soft_cap(x, 1.0, 1.0, isa))
    np.testing.assert_allclose(got, np.tanh(x.astype(np.float64)), rtol=5e-7)


@pytest.mark.parametrize("size", SIZES)
def test_softmax_parts(size: int) -> None:
    x = normal(1, size) * 20
    parts = [_native.softmax_parts(x, 0.7, isa) for isa in ISAS]
    assert all(p[0].tobytes() == parts[0][0].tobytes() for p in parts)
    assert all(p[1].tobytes() == parts[0][1].tobytes() for p in parts)
    weights, sums, maximum = parts[0]
    assert maximum == x.max()
    wanted = np.exp(((x - x.max()) * np.float32(0.7)).astype(np.float64))
    np.testing.assert_allclose(weights, wanted, rtol=2e-7, atol=1e-37)
    np.testing.assert_allclose(sums, np.add.reduceat(wanted, range(0, size, 64)), rtol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_maximum_finds_nan(size: int) -> None:
    for at in {0, size // 2, size - 1}:
        x = normal(1, size)
        x[at] = np.nan
        for isa in ISAS:
            assert math.isnan(_native.softmax_parts(x, 1.0, isa)[2])
        x[at] = np.inf
        for isa in ISAS:
            assert _native.softmax_parts(x, 1.0, isa)[2] == np.inf
