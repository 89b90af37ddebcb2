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
from vivace.models import graph_from_config
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


def is_refused(action: Callable[[], object]) -> bool:
    """Whether `action` raises one of our errors about models, in one line."""
    message = None
    try:
        action()
    except ModelError as error:
        message = str(error)
    assert "\n" not in (message or "")
    return message is not None


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_any_value_in_any_config_field(family):
    fields = CONFIG | EXTRA | {"model_type": family}
    num_refused = 0
    for name in fields:
        for value in VALUES:
            config = Config(fields | {name: value})
            num_refused += is_refused(partial(graph_from_config, config))
    assert num_refused > len(fields) * len(VALUES) / 3


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
