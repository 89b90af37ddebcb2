"""GGUF files that describe no model: one line that says what is wrong, exit code 2."""

from __future__ import annotations

import sys

import pytest
from bad_gguf_models import CASES
from gguf_files import make_good_gguf

from vivace import LLM, SamplingParams
from vivace.cli import main
from vivace.errors import BadFile, UnsupportedModel
from vivace.models.loading import load_model

pytestmark = pytest.mark.usefixtures("own_surroundings")


def load_all(path) -> None:
    """What running a model reads: graph, weights, tokenizer, template, the ids that end it."""
    model = load_model(path)
    model.check_all_weights()
    assert model.tokenizer.encode("the")
    assert model.eos_token_ids
    model.tokenizer.render_chat([{"role": "user", "content": "x"}])


def test_the_undamaged_model_answers(tmp_path):
    make_good_gguf(tmp_path / "model.gguf")
    load_all(tmp_path / "model.gguf")
    with LLM(tmp_path / "model.gguf") as llm:
        answer = llm.generate("the the", SamplingParams(temperature=0, max_tokens=5))
    assert len(answer.token_ids) > 0


@pytest.mark.parametrize("name", CASES)
def test_is_refused_in_one_line(name, tmp_path):
    expected, damage = CASES[name]
    damage(tmp_path / "model.gguf")
    with pytest.raises((BadFile, UnsupportedModel)) as caught:
        load_all(tmp_path / "model.gguf")
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message
    assert len(message) < 600
    assert ":" in message


@pytest.mark.parametrize("name", CASES)
def test_command_line_exits_with_2(name, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    CASES[name][1](tmp_path / "model.gguf")
    code = main(["run", str(tmp_path / "model.gguf"), "hello"])
    out, err = capfd.readouterr()
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line]
    assert line.startswith("error: ")
