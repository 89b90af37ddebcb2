"""`vivace quantize` and `--weights` with options, as a user meets them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vivace import LLM, SamplingParams
from vivace.cli import main
from vivace.config import resolve
from vivace.models.loading import load_model
from vivace.techniques.weight_formats.base import Packed

pytestmark = pytest.mark.usefixtures("own_surroundings")
QUESTION = "What is 7+8?"
GREEDY = SamplingParams(temperature=0, max_tokens=12)


def run(*arguments: str, code: int = 0) -> None:
    assert main(arguments) == code


@pytest.fixture(autouse=True)
def no_stdin(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))


def answer(model: str | Path, **options) -> str:
    with LLM(model, **options) as llm:
        return llm.chat([{"role": "user", "content": QUESTION}], GREEDY).text


def test_a_quantized_model_answers(tmp_path, capsys) -> None:
    run("quantize", "tiny", "--format", "int4", "--group", "64", "-o", "small")
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0] == "directory  size    bits per weight"
    assert "4.250" in printed.out
    assert printed.err == ""
    expected = answer("tiny", weights={"name": "int4", "group_size": 64})
    run("run", "./small", QUESTION, "--temperature", "0", "--max-tokens", "12")
    assert capsys.readouterr().out == expected + "\n"
    assert answer("tiny", weights="int4:group_size=64") == expected


def test_json_says_what_was_written(tmp_path, capsys) -> None:
    run("quantize", "tiny", "--format=int8,head=bfloat16", "-o", "small", "--json")
    said = json.loads(capsys.readouterr().out)
    assert said["weight_bytes"] == LLM.estimate(tmp_path / "small").weight_bytes
    assert said["num_bytes"] == sum(f.stat().st_size for f in (tmp_path / "small").iterdir())
    assert said["bits_per_weight"] == 8 * said["weight_bytes"] / said["num_weights"]


def test_the_group_is_that_of_the_body(tmp_path) -> None:
    run("quantize", "tiny", "--format", "int4,head=int8", "--group", "64", "-o", "small")
    weights = load_model(tmp_path / "small").weights
    kernels = {weights[name].kernel for name in weights if isinstance(weights[name], Packed)}
    assert kernels == {"int4/64/float16", "int8/row/float32"}


def test_a_command_takes_formats_per_role(capsys) -> None:
    roles = [{"name": "int2", "group_size": 64}, {"name": "int4", "role": "head"}]
    expected = answer("tiny", weights=roles)
    weights = "int2:group_size=64,head=int4"
    run("run", "tiny", QUESTION, "--weights", weights, "--temperature=0", "--max-tokens=12")
    assert capsys.readouterr().out == expected + "\n"
    assert LLM.estimate("tiny", weights=weights) == LLM.estimate("tiny", weights=roles)
    assert LLM.estimate("tiny", weights=weights) != LLM.estimate("tiny", weights=roles[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "int5"], "no weight_formats technique 'int5'"),
        (["--format", "int4:groups=3"], "has no option 'groups': did you mean group_size?"),
        (["--format", "int4:group_size"], "expected NAME or NAME:OPTION=VALUE"),
        (["--group", "48"], "option 'group_size' of weight_formats technique 'int4' is 48"),
        (["--format", "int4:group_size=32.0"], "is 32.0: expected 'row' or 32 or 64 or 128"),
        (["--format", "codebook:bits=3.0"], "is 3.0: expected 3 or 4"),
        (["--format", "table:values=1"], "is 1: expected a list of float"),
        (["--format", "int4:group_size=64", "--group", "32"], "say the same: give one of them"),
        (["--format", "int8:group_size=64,head=int4", "--group", "32"], "say the same"),
        (["--format", "int4,embedding=int8"], "for the role 'embedding', but the model's matrices"),
        (["--format", "int4,hat=int8"], "expected NAME or NAME:OPTION=VALUE"),
        (["--format", "int4:group_size=64,hat=int8"], "has no option 'hat'"),
        (["--format", "head=int8"], "takes one technique apart from those for some roles, not 0"),
        (["--format", "int4,head=int8,head=int4"], "names the role 'head' twice"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str, tmp_path, capsys) -> None:
    run("quantize", "tiny", *arguments, "-o", "small", code=2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "small").exists()


def test_a_folder_in_use_is_refused(tmp_path, capsys) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "mine").write_text("kept")
    run("quantize", "tiny", "-o", "small", code=2)
    assert "not an empty directory: choose another name" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "small").iterdir()] == ["mine"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path) -> None:
    code = (
        "import resource, sys; from vivace.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "sys.exit(main(['quantize', 'tiny', '-o', 'small']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith("small: File too large\n")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_estimate_counts_the_bytes_of_the_format(capsys) -> None:
    for weights in ("int4", "int4:group_size=128,symmetric=false", "int8"):
        run("run", "tiny", "--estimate", "--json", "--weights", weights)
        said = json.loads(capsys.readouterr().out)["weight_bytes"]
        with LLM("tiny", weights=weights) as llm:
            assert said == llm.weight_bytes


@pytest.mark.parametrize("weights", ["int4:", "int4:symmetric", "int4:symmetric=", ":symmetric=1",
                                     "int4:symmetric=true,symmetric=true"])  # fmt: skip
def test_options_that_do_not_parse_are_refused(weights: str, capsys) -> None:
    run("run", "tiny", QUESTION, "--weights", weights, code=2)
    assert f"'{weights}': expected NAME or NAME:OPTION=VALUE" in capsys.readouterr().err


def test_options_of_the_wrong_type_are_refused(capsys) -> None:
    run("run", "tiny", QUESTION, "--weights", "int4:symmetric=maybe", code=2)
    assert "is 'maybe': expected bool" in capsys.readouterr().err


def test_the_cache_is_a_setting() -> None:
    assert resolve({}, {"VIVACE_WEIGHT_CACHE": "off"}, [])["weight_cache"] == "off"
