"""The command line where no model is needed: what it lists, refuses, imports and returns."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vivace.cli import main
from vivace.cli.chat import read_message
from vivace.cli.models import names_model
from vivace.config import SETTINGS
from vivace.models import families

pytestmark = pytest.mark.usefixtures("own_surroundings")


@pytest.fixture(autouse=True)
def _nothing_on_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that is refused with exit code 2."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip("\n")


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# ---------------------------------------------------------------- lean


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from vivace.cli import main\n"
        "assert main(['--help']) == 0\n"
        "for sub in ('run', 'eval', 'ls', 'pull', 'export', 'techniques', 'doctor', 'config',\n"
        "            'version'):\n"
        "    assert main([sub, '--help']) == 0\n"
        "heavy = {'numpy', 'torch', 'transformers', 'tokenizers', 'huggingface_hub', 'jinja2',\n"
        "         'gguf', 'vivace._native', 'vivace.types', 'vivace.llm'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"
    for name in (
        "run",
        "eval",
        "ls",
        "pull",
        "export",
        "techniques",
        "doctor",
        "config",
        "version",
    ):
        assert f"  {name} " in done.stdout


# ---------------------------------------------------------------- listings


def test_techniques_lists_every_seam(capsys: pytest.CaptureFixture[str]) -> None:
    found = {(t["seam"], t["name"]): t for t in listed(capsys, "techniques")}
    assert found["schedulers", "chunked"]["papers"] == ["P178"]
    assert found["weight_formats", "float32"]["exactness"] == "exact"
    assert main(["techniques"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for _, name in found)


def test_ls_lists_the_shipped_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    tiny = listed(capsys, "ls")[0]
    assert (tiny["name"], tiny["origin"]) == ("tiny", "shipped")
    assert tiny["num_bytes"] <= 30e6
    assert (Path(tiny["path"]) / "config.json").is_file()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    version = listed(capsys, "version")["version"]
    assert main(["version"]) == 0
    assert capsys.readouterr().out == version + "\n"


def test_doctor_says_what_the_machine_has(capsys: pytest.CaptureFixture[str]) -> None:
    facts = listed(capsys, "doctor")
    assert facts["python"].endswith(sys.version.split()[0])
    assert 1 <= facts["threads"] <= os.cpu_count()  # type: ignore[operator]
    assert facts["instruction_set"] in facts["instruction_sets"]
    assert facts["memory_bytes"] is None or facts["memory_bytes"] > 1e8
    assert main(["doctor"]) == 0
    assert "instruction set" in capsys.readouterr().out


def test_config_show_says_where_values_come_from(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vivace.toml").write_text("threads = 2\ncontext = 64\n")
    monkeypatch.setenv("VIVACE_THREADS", "3")
    settings = listed(capsys, "config", "show", "--origin")["settings"]
    assert settings["threads"] == {"value": 3, "origin": "environment VIVACE_THREADS"}
    assert settings["context"] == {"value": 64, "origin": "file vivace.toml"}
    assert settings["model"] == {"value": "tiny", "origin": "default"}
    assert set(settings) == set(SETTINGS)
    assert main(["config", "show", "--origin"]) == 0
    assert "environment VIVACE_THREADS" in capsys.readouterr().out


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], "No such command 'rnu'"),
        (["run", "--temprature", "1", "hello"], "--temperature"),
        (["run", "--temperature"], "requires an argument"),
        (
            ["run", "--threads", "two", "hello"],
            "flag --threads: threads is 'two': expected a whole",
        ),
        (["run", "--temperature", "nan", "hi"], "temperature is 'nan': expected a number"),
        (["run", "--temperature", "-1", "hi"], "temperature is -1.0: expected a number in [0"),
        (["run", "--top-p", "0", "hi"], "top_p is 0.0: expected a number in (0, 1]"),
        (["run", "--n", "100000000000", "hi"], "n is 100000000000: expected a whole number from 1"),
        (["run", "--seed", "-1", "hi"], "seed is -1: expected a whole number"),
        (["run", "--logit-bias", "x", "hi"], "logit_bias is ('x',): expected token ids"),
        (["run", "--at-full-context", "x", "hi"], "expected stop or drop-oldest"),
        (["run", "--tokenization", "x", "hi"], "expected merges or greedy or shortest"),
        (["run", "--stop", "", "hi"], "stop is '': expected non-empty strings"),
        (["run", "tinny"], "no model 'tinny': did you mean tiny? As a prompt it needs the model"),
        (["run", "Tiny"], "no model 'Tiny': did you mean tiny?"),
        (["run"], "no prompt: give one as an argument, or pipe one in"),
        (["run", "a b", "c", "d"], "unexpected extra argument"),
        (["run", "./nowhere", "hi"], "./nowhere"),
        (["run", "no-such-org/no-such-model", "hi"], "no-such-org/no-such-model"),
        (["run", "--plan", "none.toml", "hi"], "plan none.toml: "),
        (["run", "--logprobs", "2", "hi"], "logprobs needs --json"),
        (["eval", "tiny"], "give --perplexity FILE or --kl OTHER_PLAN FILE"),
        (["eval", "tiny", "--perplexity", "a", "--kl", "b"], "eval measures one thing"),
        (["eval", "tiny", "--perplexity", "none.txt"], "none.txt: No such file"),
        (["eval", "tiny", "--perplexity", "."], "directory"),
        (["eval", "--kl", "p.toml"], "--kl needs a text"),
        (["pull", "tiny"], "'tiny' is not a hub name: expected org/name"),
        (["pull", "org/absent@v2:Q4_K_M"], "model 'org/absent:Q4_K_M' is not in the cache and"),
        (["run", "org/absent@v2:Q4_K_M"], "no prompt"),
        (["export", "tiny"], "Missing argument 'OUT.gguf'"),
        (["export", "tiny", "x.bin"], "x.bin: expected a name that ends in .gguf"),
        (["export", "tiny", "x-00001-of-00002.gguf"], "not that of a part of a split"),
        (["export", "tiny", "x.gguf", "--type", "q9_9"], "'q9_9' is not one of 'f32', 'f16'"),
        (["export", "tiny", "x.gguf"], "no name in GGUF: --pre NAME writes it"),
        (["export", "tiny", "x.gguf", "--pre", "smolm"], "did you mean smollm"),
        (["export", "./nowhere", "x.gguf"], "./nowhere"),
        (["config"], "Missing command"),
    ],
)
def test_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in refused(capsys, *arguments)


def test_a_plan_that_names_nothing_known_is_refused_with_the_nearest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plan = tmp_path / "plan.toml"
    for text, message in [
        ('kv_stores = "bfloat17"', "no kv_stores technique 'bfloat17': did you mean bfloat16"),
        ('kv_store = "bfloat16"', "no seam 'kv_store': did you mean kv_stores"),
        ('[schedulers]\nname = "chunked"\nchunk = 3', "no option 'chunk': did you mean chunk_size"),
        ('[schedulers]\nname = "chunked"\nchunk_size = "a"', "chunk_size' of schedulers technique"),
        ('[schedulers]\nname = "chunked"\nchunk_size = 0', "expected at least 1"),
        ("[schedulers]\nchunk_size = 3", 'a table with name = "..."'),
        ("[schedulers", "expected a TOML file"),
    ]:
        plan.write_text(text)
        assert message in refused(capsys, "run", "--plan", str(plan), "hi")
    assert "did you mean" in refused(capsys, "run", "--weights", "bfloat61", "hi")
    assert "did you mean" in refused(capsys, "run", "--kv", "float23", "hi")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b" \n\t\n", "empty"), (b"\xff\xfe\x00", "not UTF-8")],
)
def test_eval_refuses_a_text_without_text(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    assert message in refused(capsys, "eval", "tiny", "--perplexity", "text.txt")


def test_an_unknown_architecture_lists_the_known_ones(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "lama"}')
    message = refused(capsys, "run", str(tmp_path), "hi")
    assert "'lama' is not supported" in message
    assert message.endswith(", ".join(families()))


def test_settings_that_are_none_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIVACE_TREADS", "2")
    assert "did you mean VIVACE_THREADS" in refused(capsys, "config", "show")
    monkeypatch.delenv("VIVACE_TREADS")
    (tmp_path / "vivace.toml").write_text("contxt = 5")
    assert "did you mean context" in refused(capsys, "config", "show")


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--debug", "--perplexity", "none.txt"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("error: none.txt")


def test_what_is_no_users_mistake_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("vivace.cli.listings.list_techniques", broken)
    assert main(["techniques"]) == 70
    bug = "this is a bug in vivace: ZeroDivisionError: division by zero (--debug shows where)"
    assert capsys.readouterr().err == f"error: {bug}\n"
    assert main(["techniques", "--debug"]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m vivace.cli config show --origin | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("setting")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("text", "is_model"),
    [
        ("tiny", True),
        (".", True),
        ("./nowhere", True),
        ("nowhere.gguf", True),
        ("my own model.GGUF", True),
        ("a gguf that is not here.gguf", False),
        ("org/name", True),
        ("org/name@v2", True),
        ("org/name:Q4_K_M", True),
        ("org/name@refs/pr/1:q8_0", True),
        ("org/name:Q8_0/name-00001-of-00002.gguf", True),
        ("and/or: which is it", False),
        ("hello", False),
        ("https://example.org/page", False),
    ],
)
def test_a_model_is_told_from_a_prompt(tmp_path: Path, text: str, is_model: bool) -> None:
    (tmp_path / "my own model.GGUF").touch()
    assert names_model(text) is is_model


# ---------------------------------------------------------------- exports


def test_export_writes_a_file_that_is_a_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    written = listed(capsys, "export", "tiny", "tiny.gguf", "--pre", "smollm", "--type", "q8_0")
    assert written == {
        "path": "tiny.gguf",
        "num_bytes": (tmp_path / "tiny.gguf").stat().st_size,
        "types": {"Q8_0": 43, "F32": 13},
    }
    message = refused(capsys, "export", "tiny", "tiny.gguf", "--pre", "smollm")
    assert message == "tiny.gguf exists: --force replaces it"
    assert main(["export", "tiny.gguf", "tiny.gguf", "--force", "--type", "f16"]) == 0
    shown = capsys.readouterr()
    assert "43 F16, 13 F32" in shown.out
    assert shown.err == ""
    assert main(["run", "./tiny.gguf", "--temperature", "0", "What is 7+8?"]) == 0
    assert "Answer: 15" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_export_says_where_other_programs_differ(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "tiny", "tiny.gguf", "--pre", "smollm"]) == 0
    assert "other programs cut some texts as smollm does" in capsys.readouterr().err
    assert main(["export", "tiny", "nowhere/tiny.gguf", "--pre", "smollm"]) == 1
    assert capsys.readouterr().err.startswith("error: nowhere/tiny.gguf")


def test_only_writing_imports_the_gguf_package() -> None:
    code = (
        "import sys; from vivace.cli import main\n"
        "assert main(['run', 'tiny', 'hi', '--max-tokens', '1']) == 0\n"
        "assert 'gguf' not in sys.modules\n"
        "assert main(['export', 'tiny', 'tiny.gguf', '--pre', 'smollm']) == 0\n"
        "assert 'gguf' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, check=True)


# ---------------------------------------------------------------- messages of a chat


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["hello"], "hello"),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (['"""', "one", "", "two", '"""'], "one\n\ntwo"),
        (['"""one', 'two"""'], "one\ntwo"),
        (['"""one"""'], "one"),
        ([""], ""),
    ],
)
def test_read_message(lines: list[str], message: str) -> None:
    rest = iter(lines)
    assert read_message(lambda _: next(rest)) == message
    assert list(rest) == []
