"""Rotary tables equal transformers' for every scaling, in both spellings, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from vivace.blocks import RopeSpec
from vivace.errors import BadFile, UnsupportedModel
from vivace.models.config import Config
from vivace.models.rope import max_positions, rope_spec, rope_table

CONTEXT, HEAD_DIM = 64, 16
FACTORS = [1.0 + 0.1 * j for j in range(HEAD_DIM // 2)]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": FACTORS,
    "long_factor": [2 * item for item in FACTORS],
    "original_max_position_embeddings": 32,
}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": YARN,
    "yarn not truncated": YARN | {"truncate": False},
    "yarn with betas": YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
    "yarn with scales": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn with attention factor": YARN | {"attention_factor": 1.3},
    "yarn shrunk": YARN | {"factor": 0.5},
    "longrope": LONGROPE,
    "longrope with factor": LONGROPE | {"factor": 16.0},
    "longrope with attention factor": LONGROPE | {"attention_factor": 1.2},
    "llama3": LLAMA3,
    "llama3, other ramp": LLAMA3 | {"low_freq_factor": 2.0, "high_freq_factor": 3.0},
}


def fields(rope: dict, spelling: str, base: float) -> dict:
    """A config's fields in the old or the new spelling."""
    sizes = {"max_position_embeddings": CONTEXT}
    if spelling == "new":
        return sizes | {"rope_parameters": rope | {"rope_theta": base}}
    old = {key: value for key, value in rope.items() if key != "rope_type"}
    if rope["rope_type"] == "default":
        return sizes | {"rope_theta": base, "rope_scaling": None}
    name = "type" if spelling == "oldest" else "rope_type"
    return sizes | {"rope_theta": base, "rope_scaling": old | {name: rope["rope_type"]}}


def reference_rows(given: dict, num_positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines as token-by-token decoding takes them."""
    config = LlamaConfig(hidden_size=4 * HEAD_DIM, num_attention_heads=4, **given)
    rotary = LlamaRotaryEmbedding(config)
    rows = [rotary(torch.zeros(1), torch.tensor([[p]])) for p in range(num_positions)]
    half = HEAD_DIM // 2
    cos, sin = (torch.cat([row[i][0] for row in rows])[:, :half].numpy() for i in (0, 1))
    return cos, sin


@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
@pytest.mark.parametrize("spelling", ["new", "old", "oldest"])
@pytest.mark.parametrize("name", ROPES)
def test_equals_transformers_past_the_original_context(name, spelling, base):
    given = fields(ROPES[name], spelling, base)
    cos, sin = rope_table(rope_spec(Config(given), HEAD_DIM), 3 * CONTEXT)
    expected_cos, expected_sin = reference_rows(given, 3 * CONTEXT)
    assert cos.dtype == sin.dtype == np.float32
    np.testing.assert_allclose(cos, expected_cos, rtol=0, atol=5e-5)
    np.testing.assert_allclose(sin, expected_sin, rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", [name for name in ROPES if name != "default"])
def test_partial_rotation_has_transformers_frequencies(name):
    if name.startswith("longrope"):
        halved = dict.fromkeys(("short_factor", "long_factor"), FACTORS[: HEAD_DIM // 4])
        rope = ROPES[name] | halved
    else:
        rope = dict(ROPES[name])
    given = fields(rope | {"partial_rotary_factor": 0.5}, "new", 10_000.0)
    config = LlamaConfig(hidden_size=4 * HEAD_DIM, num_attention_heads=4, **given)
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    spec = rope_spec(Config(given), HEAD_DIM)
    assert spec.rotary_dim == HEAD_DIM // 2
    assert spec.attention_factor == pytest.approx(factor)
    np.testing.assert_allclose(spec.inv_freq, expected.numpy(), rtol=5e-7)


def test_rows_do_not_depend_on_how_many_there_are():
    for rope in ROPES.values():
        spec = rope_spec(Config(fields(rope, "new", 10_000.0)), HEAD_DIM)
        long = rope_table(spec, 5000)
        for num_positions in (0, 1, 31, 32, 33, 4097):
            short = rope_table(spec, num_positions)
            assert all(
                np.array_equal(a, b[:num_positions]) for a, b in zip(short, long, strict=True)
            )


def test_an_interleaved_table_is_the_same_table():
    spec = RopeSpec((1.0, 0.5), is_interleaved=True)
    cos, _ = rope_table(spec, 3)
    np.testing.assert_allclose(cos, np.cos(np.outer(np.arange(3), [1.0, 0.5])), rtol=1e-7)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("default", 64), ("linear", 160), ("dynamic", 192), ("yarn", 128), ("llama3", 64)],
)
def test_context(name, expected):
    assert max_positions(Config(fields(ROPES[name], "new", 10_000.0))) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, "factor"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_scaling": {"type": 3}}, "type"),
        ({"rope_parameters": LONGROPE | {"long_factor": [1.0]}}, "long_factor"),
        ({"rope_parameters": LONGROPE | {"short_factor": [0.0] * 8}}, "short_factor"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_parameters": YARN | {"beta_fast": "many"}}, "beta_fast"),
        ({"rope_parameters": YARN | {"truncate": 1}}, "truncate"),
        ({"partial_rotary_factor": 0.1}, "head_dim"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
    ],
)
def test_a_wrong_field_is_named(change, message):
    with pytest.raises(BadFile, match=message):
        rope_spec(Config({"max_position_embeddings": 64} | change), HEAD_DIM)


def test_unknown_kinds_are_refused_with_the_nearest():
    with pytest.raises(UnsupportedModel, match="did you mean llama3"):
        rope_spec(Config({"rope_scaling": {"type": "lama3"}}), HEAD_DIM)
    nested = {"rope_parameters": {"full_attention": {"rope_type": "default"}}}
    with pytest.raises(UnsupportedModel, match="full_attention"):
        rope_spec(Config(nested), HEAD_DIM)
