"""Logits equal transformers' for every family and rope, cached or not, and every field matters."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import (
    SIZES,
    make_executor,
    random_tokens,
    reference_logits,
    reference_model,
    run_logits,
    save,
)
from transformers import AutoModelForCausalLM

from vivace.blocks import AttentionBlock
from vivace.errors import UnsupportedModel
from vivace.models import _NEUTRAL, families, graph_from_config
from vivace.models.config import Config
from vivace.models.loading import load_model

TOLERANCE = 1e-4
HALF = 8  # pairs of a head of 16
FACTORS = [1.0 + 0.15 * index for index in range(HALF)]

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
    "factor": 2.0,
}


def rope(parameters: dict[str, Any], base: float = 10_000.0) -> dict[str, Any]:
    return {"rope_parameters": parameters | {"rope_theta": base}}


WINDOW = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
# name -> family, config fields
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, one head each": ("llama", {"num_key_value_heads": 4}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, own head size": ("llama", {"head_dim": 24}),
    "llama, gelu": ("llama", {"hidden_act": "gelu"}),
    "llama, tanh gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama, relu": ("llama", {"hidden_act": "relu"}),
    "llama, base 500000": ("llama", rope({"rope_type": "default"}, 500_000.0)),
    "llama, linear": ("llama", rope({"rope_type": "linear", "factor": 2.0})),
    "llama, dynamic": ("llama", rope({"rope_type": "dynamic", "factor": 2.0})),
    "llama, yarn": ("llama", rope(YARN)),
    "llama, yarn untruncated": ("llama", rope(YARN | {"truncate": False})),
    "llama, yarn scales": ("llama", rope(YARN | {"mscale": 1.0, "mscale_all_dim": 0.7})),
    "llama, longrope": ("llama", rope(LONGROPE)),
    "llama, llama3": ("llama", rope(LLAMA3)),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, window above": ("qwen2", WINDOW),
    "qwen2, window everywhere": ("qwen2", WINDOW | {"max_window_layers": 0}),
    "qwen2, layer types": (
        "qwen2",
        WINDOW | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "qwen2, yarn": ("qwen2", rope(YARN, 1e6)),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3, biases": ("qwen3", {"head_dim": 32, "attention_bias": True}),
    "qwen3, window": ("qwen3", WINDOW | {"head_dim": 32}),
    "qwen3, yarn": ("qwen3", rope(YARN, 1e6) | {"head_dim": 16}),
}
# Scalings whose frequencies change with the length: a long prefill in transformers rotates all its
# rows alike, so the token-by-token run is the one to equal.
BY_POSITION = ("dynamic", "longrope")
NUM_TOKENS = 150  # past every original context (32 or 64) and every window (9)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Saved checkpoints with the logits to equal, made once each."""
    made: dict[str, Any] = {}

    def get(variant: str):
        if variant not in made:
            family, fields = VARIANTS[variant]
            model = reference_model(family, fields)
            tokens = random_tokens(NUM_TOKENS)
            by_position = any(name in variant for name in BY_POSITION)
            expected = reference_logits(model, tokens, one_by_one=by_position)
            path = save(model, tmp_path_factory.mktemp("checkpoint"))
            made[variant] = (path, tokens, expected)
        return made[variant]

    return get


@pytest.mark.parametrize("executor", ["torch", "native"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant, executor, checkpoints):
    path, tokens, expected = checkpoints(variant)
    model = load_model(path)
    running = make_executor(executor, model.graph, model.weights)
    for chunk in (NUM_TOKENS, 7, 1):
        logits = run_logits(running, tokens, chunk)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE, err_msg=f"{chunk=}")


@pytest.mark.parametrize("variant", ["qwen2, window above", "llama, yarn"])
def test_cached_transformers_gives_the_same(variant, checkpoints):
    """The reference itself: its cache and its prefill agree, so either may be the truth."""
    family, fields = VARIANTS[variant]
    _, tokens, expected = checkpoints(variant)
    cached = reference_logits(reference_model(family, fields), tokens, one_by_one=True)
    np.testing.assert_allclose(cached, expected, rtol=0, atol=TOLERANCE)


# ---------------------------------------------------------------- every field matters

# rope kind -> its parameters, and a variant that has them
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "default": ({"rope_type": "default"}, "llama"),
    "linear": ({"rope_type": "linear", "factor": 2.0}, "llama, linear"),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, "llama, dynamic"),
    "yarn": (YARN, "llama, yarn"),
    "longrope": (LONGROPE, "llama, longrope"),
    "llama3": (LLAMA3, "llama, llama3"),
}
HALF_ROTARY = {"partial_rotary_factor": 0.5}
HALF_FACTORS = {"short_factor": FACTORS[: HALF // 2], "long_factor": FACTORS[HALF // 2 :]}
OF_ANY_FAMILY: list[dict[str, Any]] = [
    {"rms_norm_eps": 0.05},
    {"hidden_act": "gelu"},
    {"num_hidden_layers": 2, "layer_types": None},
    {"tie_word_embeddings": True},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    {"rope_parameters": None, "rope_theta": 20_000.0},
    {"rope_scaling": {"type": "linear", "factor": 1.1}},
    HALF_ROTARY,
]
# variant -> changed fields; each must move the logits by more than 100 tolerances
CHANGES: list[tuple[str, dict[str, Any]]] = [
    *((family, change) for family in ("llama", "qwen2", "qwen3") for change in OF_ANY_FAMILY),
    *((variant, rope(parameters, 20_000.0)) for parameters, variant in KINDS.values()),
    *(
        (variant, rope(parameters | HALF_ROTARY | (HALF_FACTORS if kind == "longrope" else {})))
        for kind, (parameters, variant) in KINDS.items()
    ),
    ("llama, gelu", {"hidden_act": "gelu_pytorch_tanh"}),
    ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}),
    ("llama, biases", {"attention_bias": False}),
    ("llama, biases", {"mlp_bias": False}),
    ("llama, linear", rope({"rope_type": "linear", "factor": 2.2})),
    ("llama, dynamic", rope({"rope_type": "dynamic", "factor": 3.0})),
    ("llama, dynamic", {"max_position_embeddings": 96}),
    ("llama, yarn", rope(YARN | {"factor": 4.4})),
    ("llama, yarn", rope(YARN | {"original_max_position_embeddings": 64})),
    ("llama, yarn", rope(YARN | {"attention_factor": 1.0})),
    ("llama, yarn untruncated", rope(YARN | {"truncate": False, "beta_fast": 2.0})),
    ("llama, yarn", rope(YARN | {"beta_slow": 0.2})),
    ("llama, yarn", rope(YARN | {"mscale": 1.0, "mscale_all_dim": 0.7})),
    ("llama, yarn", rope(YARN | {"truncate": False})),
    ("llama, yarn", {"original_max_position_embeddings": 64}),
    ("llama, longrope", rope(LONGROPE | {"short_factor": FACTORS[::-1]})),
    ("llama, longrope", rope(LONGROPE | {"long_factor": FACTORS})),
    ("llama, longrope", rope(LONGROPE | {"original_max_position_embeddings": 48})),
    ("llama, longrope", rope(LONGROPE | {"factor": 4.0})),
    ("llama, longrope", rope(LONGROPE | {"attention_factor": 1.0})),
    ("llama, llama3", rope(LLAMA3 | {"factor": 4.0})),
    ("llama, llama3", rope(LLAMA3 | {"low_freq_factor": 0.5})),
    ("llama, llama3", rope(LLAMA3 | {"high_freq_factor": 6.0})),
    ("llama, llama3", rope(LLAMA3 | {"original_max_position_embeddings": 64})),
    ("qwen2", {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}),
    ("qwen2, yarn", {"original_max_position_embeddings": 64}),
    ("qwen2, window above", {"use_sliding_window": False, "layer_types": None}),
    ("qwen2, window above", {"sliding_window": 10}),
    ("qwen2, window above", {"max_window_layers": 2, "layer_types": None}),
    ("qwen2, layer types", {"layer_types": ["sliding_attention"] * 3}),
    ("qwen3", {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}),
    ("qwen3, biases", {"attention_bias": False}),
    ("qwen3, window", {"use_sliding_window": False, "layer_types": None}),
    ("qwen3, window", {"sliding_window": 10}),
    ("qwen3, window", {"max_window_layers": 2, "layer_types": None}),
    ("qwen3, window", {"layer_types": ["sliding_attention"] * 3}),
    ("qwen3, yarn", {"original_max_position_embeddings": 64}),
]


@pytest.mark.parametrize(("variant", "change"), CHANGES, ids=lambda item: str(item)[:80])
def test_every_config_field_matters(variant, change, checkpoints):
    path, tokens, expected = checkpoints(variant)
    fields = json.loads((path / "config.json").read_text()) | change
    weights = dict(load_model(path).weights)
    graph = graph_from_config(Config(fields))
    if variant == "qwen3" and "head_dim" in change:  # norms of the new head size
        for name in [name for name in weights if "q_norm" in name or "k_norm" in name]:
            weights[name] = weights[name][: change["head_dim"]]
    executor = make_executor("torch", graph, weights)
    moved = np.abs(run_logits(executor, tokens, NUM_TOKENS) - expected).max()
    assert moved > 100 * TOLERANCE


# Fields that are read and need no change above, by why.
CHECKED_AGAINST_TENSORS = {"vocab_size", "hidden_size", "intermediate_size"}  # test_bad_files.py
ONLY_THE_CONTEXT_LENGTH = {
    *((family, "max_position_embeddings") for family in ("llama", "qwen2", "qwen3")),
    *((kind, "original_max_position_embeddings") for kind in ("linear", "dynamic")),
}
CHOOSE_WHAT_IS_READ = {"model_type", "rope_type", "type"}
ONLY_REFUSED = set(_NEUTRAL)  # test_fields_that_are_not_supported_are_refused


class Reads(dict):
    """A config that notes which fields are asked for, as (family or rope kind, field)."""

    def __init__(self, values: dict[str, Any], owner: str, noted: set[tuple[str, str]]) -> None:
        super().__init__(values)
        self.owner, self.noted = owner, noted

    def get(self, name: str, default: Any = None) -> Any:
        self.noted.add((self.owner, name))
        value = super().get(name, default)
        if name in ("rope_parameters", "rope_scaling") and value:
            return Reads(value, value.get("rope_type") or value["type"], self.noted)
        return value


def changed_fields(
    family: str, before: dict[str, Any], change: dict[str, Any]
) -> set[tuple[str, str]]:
    """What a change changes, as (family or rope kind, field)."""
    changed = {(family, name) for name in change}
    now, old = change.get("rope_parameters") or {}, before["rope_parameters"]
    if now.get("rope_type") == old["rope_type"]:
        names = now.keys() | old.keys()
        changed |= {(now["rope_type"], name) for name in names if now.get(name) != old.get(name)}
    return changed


def test_no_field_is_read_without_a_change_that_shows_it(checkpoints):
    configs = {v: json.loads((checkpoints(v)[0] / "config.json").read_text()) for v in VARIANTS}
    read: set[tuple[str, str]] = set()
    for variant, fields in configs.items():
        graph_from_config(Config(Reads(fields, VARIANTS[variant][0], read)))
    shown: set[tuple[str, str]] = set()
    for variant, change in CHANGES:
        shown |= changed_fields(VARIANTS[variant][0], configs[variant], change)
    explained = CHECKED_AGAINST_TENSORS | CHOOSE_WHAT_IS_READ | ONLY_REFUSED
    left = {item for item in read - ONLY_THE_CONTEXT_LENGTH if item[1] not in explained}
    assert left - shown == set()
    assert len(left) > 60


@pytest.mark.parametrize("kind", ["yarn", "longrope"])
def test_a_missing_factor_follows_from_the_lengths(kind):
    parameters = {name: value for name, value in KINDS[kind][0].items() if name != "factor"}
    ropes = [
        graph_from_config(
            Config(SIZES | {"model_type": "llama", "max_position_embeddings": length} | more)
        ).ropes
        for length, more in (
            (128, rope(parameters)),
            (128, rope(parameters | {"factor": 4.0})),
            (256, rope(parameters)),
        )
    ]
    assert ropes[0] == ropes[1]
    assert ropes[0] != ropes[2]


def test_fields_that_are_not_supported_are_refused():
    for name, neutral in _NEUTRAL.items():
        for value in (*neutral, {"any": "thing"}):
            config = Config(SIZES | {"model_type": "llama", name: value})
            if value in neutral:
                graph_from_config(config)
                continue
            with pytest.raises(UnsupportedModel, match=f"field '{name}' is not supported"):
                graph_from_config(config)


def test_old_and_new_spelling_give_one_graph(checkpoints):
    for variant in ("llama, linear", "llama, dynamic", "llama, yarn", "llama, llama3"):
        path, _, _ = checkpoints(variant)
        new = json.loads((path / "config.json").read_text())
        old = copy.deepcopy(new)
        parameters = old.pop("rope_parameters")
        old["rope_theta"] = parameters.pop("rope_theta")
        old["rope_scaling"] = parameters
        oldest = copy.deepcopy(old)
        oldest["rope_scaling"]["type"] = oldest["rope_scaling"].pop("rope_type")
        graphs = [graph_from_config(Config(fields)) for fields in (new, old, oldest)]
        assert graphs[0] == graphs[1] == graphs[2]


def test_windows_make_layer_groups(checkpoints):
    graph = load_model(checkpoints("qwen2, layer types")[0]).graph
    assert [(group.num_layers, group.window) for group in graph.groups] == [(2, 9), (1, None)]
    attention = [block for block in graph.blocks if isinstance(block, AttentionBlock)]
    assert [(block.group, block.cache_layer) for block in attention] == [(0, 0), (1, 0), (0, 1)]


def test_sharded_and_bfloat16_checkpoints(tmp_path):
    reference_model("llama", {}).bfloat16().save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = load_model(tmp_path)
    assert loaded.weights["model.norm.weight"].dtype.name == "bfloat16"
    tokens = random_tokens(20)
    logits = run_logits(make_executor("torch", loaded.graph, loaded.weights), tokens, 20)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = reference_logits(reference, tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)


def test_families_are_the_files():
    assert families() == ["llama", "qwen2", "qwen3"]
    for family in families():
        graph = graph_from_config(Config(SIZES | {"model_type": family}))
        assert graph.family == family
        assert graph.num_layers == SIZES["num_hidden_layers"]


def test_a_family_is_found_by_architecture_too():
    named = SIZES | {"architectures": ["Qwen2ForCausalLM"]}
    assert graph_from_config(Config(named)).family == "qwen2"
