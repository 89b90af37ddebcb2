"""Damaged quantized checkpoints: one line that says what to do; what is odd but good loads."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from bad_files import LAYER
from bad_quantized import CASES, METHODS, damage, make_quantized
from quantized_files import read_tensors, write_tensors

from vivace.cli import main
from vivace.errors import ModelError
from vivace.models.loading import load_model

pytestmark = pytest.mark.usefixtures("own_surroundings")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The directory of a good checkpoint for each method."""
    path = tmp_path_factory.mktemp("quantized")
    for method in METHODS:
        make_quantized(path / method, method)
    return path


@pytest.mark.parametrize("method", METHODS)
def test_the_undamaged_checkpoint_loads(method, good):
    model = load_model(good / method)
    assert model.weight_format == {"name": "stored"}
    model.check_all_weights()


@pytest.mark.parametrize("name", CASES)
def test_is_refused_in_one_line(name, good, tmp_path):
    method, expected, _, _ = CASES[name]
    path = tmp_path / "model"
    shutil.copytree(good / method, path)
    damage(path, name)
    with pytest.raises(ModelError) as caught:
        load_model(path)
    message = str(caught.value)
    assert re.search("|".join(map(re.escape, expected.split("|"))), message), message
    assert "\n" not in message
    assert len(message) < 600


def test_command_line_exits_with_2(good, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    path = tmp_path / "model"
    shutil.copytree(good / "gptq", path)
    damage(path, "gptq: scales missing")
    assert main(["run", str(path), "hello"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_scales_of_zero_are_weights_of_zero(good, tmp_path):
    path: Path = tmp_path / "model"
    shutil.copytree(good / "gptq", path)
    tensors = read_tensors(path / "model.safetensors")
    tensors[f"{LAYER}.mlp.up_proj.scales"][:] = 0
    write_tensors(path / "model.safetensors", tensors)
    assert not np.asarray(load_model(path).weights[f"{LAYER}.mlp.up_proj.weight"]).any()
