"""Any value in any field and any byte in a header: a model loads or is refused, nothing else."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from bad_files import CONFIG, make_good, weights
from mutations import LOADERS

from vivace.errors import ModelError
from vivace.models import families, graph_from_config
from vivace.models.config import Config
from vivace.models.loading import load_model
from vivace.models.rope import rope_table

VALUES = [
    *(-1, 0, 1, 3, 2**31, 2**63, 10**400, 1.5, -0.0, 1e308, math.nan, math.inf, -math.inf),
    *("5", "", "\ud800", "silu" * 1000, True, False, None, [], [1], [[]], {}, {"a": {}}),
]
ROPES = [
    {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "attention_factor": 1.0,
        "truncate": True,
    },
    {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.0],
        "long_factor": [1.0, 1.0],
        "original_max_position_embeddings": 32,
        "factor": 2.0,
    },
    {
        "rope_type": "llama3",
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
]
EXTRA = {
    "hidden_act": "silu",
    "head_dim": 4,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": True,
    "sliding_window": 8,
    "max_window_layers": 0,
    "layer_types": None,
    "partial_rotary_factor": 1.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "quantization_config": None,
    "pretraining_tp": 1,
}


EXPERTS = {
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "qkv_bias": True,
    "router_jitter_noise": 0.1,
    "lm_head_bias": True,
}
GEMMA = {
    "hidden_activation": "silu",
    "query_pre_attn_scalar": 4,
    "sliding_window_pattern": 2,
    "_sliding_window_pattern": 2,
    "rope_local_base_freq": 100.0,
}
ATTENTION = {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False}
FFN = {"ffn_mult": 1.0, "no_op": False, "replace_with_linear": False}
# What the families read beyond the fields of all.
OF_FAMILY: dict[str, dict] = {
    "gemma2": GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0},
    "gemma3": {"text_config": {"vocab_size": 260, "hidden_size": 16}},
    "gemma3_text": GEMMA,
    "gpt2": {
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 64,
        "n_inner": 8,
        "activation_function": "gelu",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": True,
    },
    "mimo": {"num_nextn_predict_layers": 1},
    "minicpm": {"scale_emb": 2.0, "scale_depth": 1.4, "dim_model_base": 8},
    "mixtral": EXPERTS | {"num_local_experts": 4},
    "nemotron_nas": {"block_configs": [{"attention": ATTENTION, "ffn": FFN}]},
    "olmoe": EXPERTS | {"num_experts": 4},
    "phimoe": EXPERTS | {"num_local_experts": 4},
    "qwen2_moe": EXPERTS | {"num_experts": 4},
    "qwen3_moe": EXPERTS | {"num_experts": 4},
    "smollm3": {"no_rope_layers": [1], "no_rope_layer_interval": 4},
}


def is_refused(action: Callable[[], object]) -> bool:
    """Whether `action` raises one of our errors about models, in one line."""
    message = None
    try:
        action()
    except ModelError as error:
        message = str(error)
    assert "\n" not in (message or "")
    return message is not None


@pytest.mark.parametrize("family", families())
def test_any_value_in_any_config_field(family):
    fields = CONFIG | EXTRA | OF_FAMILY.get(family, {}) | {"model_type": family}
    assert not is_refused(partial(graph_from_config, Config(fields)))
    num_refused = 0
    for name in fields:
        for value in VALUES:
            config = Config(fields | {name: value})
            num_refused += is_refused(partial(graph_from_config, config))
    assert num_refused > (30 if family == "gemma3" else 300)


@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_any_value_in_any_field_of_a_puzzle_layer(part):
    fields = CONFIG | {"model_type": "nemotron-nas"}
    layer = {"attention": ATTENTION, "ffn": FFN}
    num_refused = 0
    for name in (*layer[part], "window_length", "num_sink_tokens", "sparsify"):
        for value in VALUES:
            changed = layer | {part: layer[part] | {name: value}}
            config = Config(fields | {"block_configs": [changed]})
            num_refused += is_refused(partial(graph_from_config, config))
    assert num_refused > 60


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_any_value_in_any_rope_field(rope):
    def build(fields: dict) -> None:
        graph = graph_from_config(Config(CONFIG | fields))
        cos, sin = rope_table(graph.ropes[0], 100)
        assert np.isfinite(cos).all()
        assert np.isfinite(sin).all()

    build({"rope_parameters": rope})
    for name in rope:
        for value in VALUES:
            for spelling in ("rope_parameters", "rope_scaling"):
                is_refused(partial(build, {spelling: rope | {name: value}}))


def test_any_byte_in_a_header(tmp_path):
    good, path = tmp_path / "good", tmp_path / "model"
    make_good(good)
    shutil.copytree(good, path)
    data = (good / "model.safetensors").read_bytes()
    header_length = int.from_bytes(data[:8], "little")
    dice = random.Random(0)
    num_refused = 0
    for _ in range(600):
        damaged = bytearray(data)
        for _ in range(dice.choice((1, 1, 2, 8))):
            at = dice.randrange(8 + header_length)
            damaged[at] = dice.choice((dice.randrange(256), damaged[at] ^ 1, ord("9"), ord("]")))
        if dice.random() < 0.2:
            del damaged[dice.randrange(len(damaged)) :]
        weights(path).write_bytes(damaged)
        num_refused += is_refused(partial(load_model, path))
    assert num_refused > 500


def read_all(path: Path) -> None:
    model = load_model(path)
    model.tokenizer.encode("fox", add_special=False)
    assert isinstance(model.eos_token_ids, frozenset)


def test_any_byte_in_the_other_files(tmp_path):
    good, path = tmp_path / "good", tmp_path / "model"
    make_good(good)
    (good / "generation_config.json").write_text(json.dumps({"eos_token_id": [257]}))
    shutil.copytree(good, path)
    dice = random.Random(1)
    names = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
    for name in names:
        data = (good / name).read_bytes()
        for _ in range(120):
            damaged = bytearray(data)
            for _ in range(dice.choice((1, 2, 8))):
                damaged[dice.randrange(len(data))] = dice.randrange(256)
            (path / name).write_bytes(damaged)
            is_refused(partial(read_all, path))
        (path / name).write_bytes(data)


@pytest.mark.parametrize("loader", LOADERS)
def test_damaged_files_are_read_or_refused(loader, tmp_path):
    """The first cases of tools/fuzz_files.py."""
    make, read = LOADERS[loader]
    num_refused = 0
    for index in range(500):
        folder = tmp_path / str(index)
        folder.mkdir()
        path = make(random.Random(f"{loader} 0 {index}"), folder)
        num_refused += is_refused(partial(read, path))
    assert 250 < num_refused < 500
