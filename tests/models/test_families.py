"""Logits equal transformers' for every family and rope, cached or not, and every field matters."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import (
    checkpoint,
    make_executor,
    random_tokens,
    reference_logits,
    reference_model,
    routing_margins,
    run_logits,
)
from transformers import AutoModelForCausalLM
from variants import BY_POSITION, CHANGES, REFUSED_CHANGES, VARIANTS

from vivace.errors import ModelError
from vivace.models import families, graph_from_config
from vivace.models.config import Config
from vivace.models.loading import load_model

TOLERANCE = 1e-4
NUM_TOKENS = 150  # past every original context (32 or 64) and every window (9)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Saved checkpoints with the logits to equal, made once each."""
    made: dict[str, Any] = {}

    def get(variant: str):
        if variant not in made:
            path = tmp_path_factory.mktemp("checkpoint")
            model, tokens = checkpoint(variant, path), random_tokens(NUM_TOKENS)
            by_position = any(name in variant for name in BY_POSITION)
            expected = reference_logits(model, tokens, one_by_one=by_position)
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


@pytest.mark.parametrize("variant", ["qwen2, window above", "llama, yarn", "gemma2", "mixtral"])
def test_cached_transformers_gives_the_same(variant, checkpoints, tmp_path):
    """The reference itself: its cache and its prefill agree, so either may be the truth."""
    _, tokens, expected = checkpoints(variant)
    cached = reference_logits(checkpoint(variant, tmp_path), tokens, one_by_one=True)
    np.testing.assert_allclose(cached, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "moe" in v or "mixtral" in v])
def test_routing_does_not_hang_on_rounding(variant, tmp_path):
    """The reference itself: router logits are further from a tie than logits may differ."""
    model = checkpoint(variant, tmp_path)
    by_position = any(name in variant for name in BY_POSITION)
    with routing_margins(model) as margins:
        reference_logits(model, random_tokens(NUM_TOKENS), one_by_one=by_position)
    assert min(margins) > 4 * TOLERANCE


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


# ---------------------------------------------------------------- every field matters


def read_config(path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


@pytest.mark.parametrize(("variant", "change"), CHANGES, ids=lambda item: str(item)[:80])
def test_every_config_field_matters(variant, change, checkpoints):
    path, tokens, expected = checkpoints(variant)
    graph = graph_from_config(Config(read_config(path) | change))
    executor = make_executor("torch", graph, load_model(path).weights)
    moved = np.abs(run_logits(executor, tokens, NUM_TOKENS) - expected).max()
    assert moved > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("variant", "change", "message"), REFUSED_CHANGES, ids=lambda item: str(item)[:80]
)
def test_a_config_of_another_model_is_refused(variant, change, message, checkpoints, tmp_path):
    path, _, _ = checkpoints(variant)
    (tmp_path / "model.safetensors").symlink_to(path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(read_config(path) | change))
    with pytest.raises(ModelError, match=re.escape(message)):
        load_model(tmp_path)


# Fields that are read and need no change above, by why.
CHECKED_AGAINST_TENSORS = {"vocab_size", "hidden_size", "intermediate_size"}  # test_bad_files.py
ONLY_THE_CONTEXT_LENGTH = {
    *((family, "max_position_embeddings") for family in families()),
    *((kind, "original_max_position_embeddings") for kind in ("linear", "dynamic")),
}
CHOOSE_WHAT_IS_READ = {"model_type", "rope_type", "type"}
REFUSED_UNLESS_NULL = {"window_length", "num_sink_tokens", "sparsify"}  # test_puzzle_...
A_WRAPPER = "gemma3"  # test_gemma3_is_its_text_model


class Reads(dict):
    """A config that notes which fields are asked for, as (owner, field).

    The owner of a field is the family, or inside an object what `owner_of` says.
    """

    def __init__(self, values: Mapping[str, Any], owner: str, noted: set[tuple[str, str]]) -> None:
        super().__init__(values)
        self.owner, self.noted = owner, noted

    def get(self, name: str, default: Any = None) -> Any:
        self.noted.add((self.owner, name))
        value = super().get(name, default)
        if isinstance(value, dict) and value:
            return Reads(value, owner_of(name, value), self.noted)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return [Reads(item, name, self.noted) for item in value]
        return value

    def __getitem__(self, name: str) -> Any:
        return self.get(name)


def owner_of(name: str, value: Mapping[str, Any]) -> str:
    """A rope's kind, or what an object is called."""
    kind = value.get("rope_type") or value.get("type")
    return str(kind) if name in ("rope_parameters", "rope_scaling") and kind else name


def flattened(fields: Mapping[str, Any], owner: str) -> dict[tuple[str, str], list[Any]]:
    """The values of every (owner, field) of a config, those of objects inside it too."""
    flat: dict[tuple[str, str], list[Any]] = {}
    for name, value in fields.items():
        flat.setdefault((owner, name), []).append(value)
        items = value if isinstance(value, list) else [value]
        for item in (item for item in items if isinstance(item, Mapping)):
            for key, values in flattened(item, owner_of(name, item)).items():
                flat.setdefault(key, []).extend(values)
    return flat


def changed_fields(family: str, before: Mapping[str, Any], change: Mapping[str, Any]) -> set:
    """What a change changes, as (owner, field); a rope of another kind is not compared by field."""
    old, new = flattened(before, family), flattened({**before, **change}, family)
    owners = {owner for owner, _ in old} & {owner for owner, _ in new}
    names = {key for key in old.keys() | new.keys() if key[0] in owners}
    return {key for key in names if old.get(key) != new.get(key)}


def test_no_field_is_read_without_a_change_that_shows_it(checkpoints):
    variants = [variant for variant, (family, _) in VARIANTS.items() if family != A_WRAPPER]
    configs = {variant: read_config(checkpoints(variant)[0]) for variant in variants}
    read: set[tuple[str, str]] = set()
    for variant, fields in configs.items():
        family = VARIANTS[variant][0]
        module = importlib.import_module(f"vivace.models.families.{family}")
        module.graph(Config(Reads(fields, family, read)))
    shown: set[tuple[str, str]] = set()
    for variant, change in [*CHANGES, *((item[0], item[1]) for item in REFUSED_CHANGES)]:
        shown |= changed_fields(VARIANTS[variant][0], configs[variant], change)
    explained = CHECKED_AGAINST_TENSORS | CHOOSE_WHAT_IS_READ | REFUSED_UNLESS_NULL
    left = {item for item in read - ONLY_THE_CONTEXT_LENGTH if item[1] not in explained}
    assert not left - shown, sorted(left - shown)
    assert len(left) > 250
