"""`vivace run` and `vivace eval` with the shipped model, as a user meets them."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vivace import LLM, SamplingParams, _native
from vivace.cli import main
from vivace.cli.chat import Chat
from vivace.cli.models import load
from vivace.config import resolve
from vivace.executors.native import NativeExecutor

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "vivace.cli"]


pytestmark = pytest.mark.usefixtures("own_surroundings")


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny") as model:
        yield model


@pytest.fixture
def vivace(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[str, str]]:
    """Run a command that succeeds; returns stdout and stderr."""

    def call(*arguments: str, piped: str = "", code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped.encode())))
        assert main(arguments) == code
        captured = capsys.readouterr()
        return captured.out, captured.err

    return call


Vivace = Callable[..., tuple[str, str]]
QUESTION = "What is 7+8?"
WORDS = "Formatting pending Subroutines, Deprecated abstractmethods"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


# ---------------------------------------------------------------- one answer


def test_a_prompt_streams_the_answer_of_the_api(vivace: Vivace, llm: LLM) -> None:
    expected = llm.chat([user(QUESTION)]).text
    assert expected.strip()
    assert vivace("run", QUESTION) == (expected + "\n", "")
    assert vivace("run", "tiny", QUESTION) == (expected + "\n", "")


def test_what_is_piped_in_is_the_prompt(vivace: Vivace, llm: LLM) -> None:
    assert vivace("run", piped=QUESTION + "\n")[0] == llm.chat([user(QUESTION)]).text + "\n"
    both = llm.chat([user("Copy this:\n\none\ntwo")]).text
    assert vivace("run", "Copy this:", piped="one\ntwo\n")[0] == both + "\n"


def test_what_is_piped_in_must_be_text(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run([*COMMAND, "run"], input=b"\xff\xfe", capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"error: stdin is not UTF-8 text")


def test_raw_continues_the_text(vivace: Vivace, llm: LLM) -> None:
    text = llm.generate("import os\n", SamplingParams(temperature=0, max_tokens=8)).text
    assert vivace("run", "--raw", "--max-tokens", "8", "import os\n")[0] == text + "\n"


def test_a_system_message_changes_the_conversation(vivace: Vivace, llm: LLM) -> None:
    messages = [{"role": "system", "content": "Be brief."}, user(QUESTION)]
    out = json.loads(vivace("run", "--system", "Be brief.", "--json", QUESTION)[0])
    assert out["prompt_token_ids"] == llm.tokenizer.encode_chat(messages)


def test_json_holds_the_whole_completion(vivace: Vivace, llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, seed=3, n=2, max_tokens=5, logprobs=2)
    expected = llm.chat([user(QUESTION)], params)
    options = ["--temperature", "1.5", "--seed", "3", "--n", "2", "--max-tokens", "5"]
    out = json.loads(vivace("run", *options, "--logprobs", "2", "--json", QUESTION)[0])
    assert [c["token_ids"] for c in out["choices"]] == [c.token_ids for c in expected.choices]
    assert [c["text"] for c in out["choices"]] == [c.text for c in expected.choices]
    assert out["choices"][0]["finish_reason"] == "length"
    assert len(out["choices"][0]["logprobs"][0]["top"]) == 2
    assert out["timing"]["num_tokens"] == 10


def test_sampling_options_and_variables_reach_the_sampler(
    vivace: Vivace, monkeypatch: pytest.MonkeyPatch
) -> None:
    hot = ("run", "--temperature", "5", "--max-tokens", "12", QUESTION)
    first = vivace(*hot, "--seed", "1")[0]
    assert vivace(*hot, "--seed", "1")[0] == first
    assert vivace(*hot, "--seed", "2")[0] != first
    monkeypatch.setenv("VIVACE_SEED", "1")
    assert vivace(*hot)[0] == first
    assert vivace("run", "--max-tokens", "1", QUESTION)[0] != vivace("run", QUESTION)[0]
    stopped = vivace("run", "--stop", "Answer", QUESTION)[0]
    assert "Answer" not in stopped


def test_an_answer_cut_short_says_so_on_stderr(vivace: Vivace) -> None:
    assert vivace("run", "--max-tokens", "200", QUESTION)[1] == ""
    endless = ("run", "--ignore-eos", QUESTION)
    stopped = "[stopped at max_tokens: a higher one allows more]\n"
    full = "[the context is full: all 64 tokens are used]\n"
    assert vivace(*endless, "--max-tokens", "3")[1] == stopped
    assert vivace(*endless, "--max-tokens", "3", "--n", "2")[1] == 2 * stopped
    assert vivace(*endless, "--context", "64")[1] == full
    assert vivace(*endless, "--context", "64", "--n", "2")[1] == 2 * full


def test_one_word_may_be_a_prompt_if_it_is_like_no_model(vivace: Vivace, llm: LLM) -> None:
    assert vivace("run", "Hello")[0] == llm.chat([user("Hello")]).text + "\n"
    assert vivace("run", "tiny", "tinny")[0] == llm.chat([user("tinny")]).text + "\n"


def test_text_becomes_tokens_as_the_option_says(vivace: Vivace) -> None:
    counts = {}
    for mode in ("merges", "greedy", "shortest"):
        answer, _ = vivace(
            "run", "--json", "--raw", "--tokenization", mode, "--max-tokens", "1", WORDS
        )
        counts[mode] = len(json.loads(answer)["prompt_token_ids"])
        with LLM("tiny", tokenization=mode) as model:
            assert counts[mode] == len(model.tokenizer.encode(WORDS))
    assert counts["shortest"] < counts["merges"]


def test_the_instruction_set_is_chosen_for_one_model() -> None:
    for flags, isa in (({"isa": "generic"}, "generic"), ({}, _native.isa_names()[-1])):
        with load("tiny", resolve(flags, {}, [])) as model:
            assert isinstance(model.engine.executor, NativeExecutor)
            assert model.engine.executor.isa == isa


def test_verbose_tells_timing_on_stderr(vivace: Vivace) -> None:
    out, err = vivace("run", "--verbose", QUESTION)
    assert out == vivace("run", QUESTION)[0]
    assert re.fullmatch(
        r"\d+ prompt tokens at \d+/s, \d+ tokens at [\d.]+/s, first after [\d.]+ s\n", err
    )


def test_estimate_loads_no_weights(vivace: Vivace, llm: LLM) -> None:
    out = json.loads(vivace("run", "tiny", "--estimate", "--json")[0])
    assert out["weight_bytes"] == llm.weight_bytes
    assert out["cache_bytes"] == llm.cache_bytes
    parts = out["weight_bytes"] + out["cache_bytes"] + out["working_bytes"]
    assert out["total_bytes"] == parts
    half = json.loads(vivace("run", "--estimate", "--json", "--context", "1024")[0])
    assert half["cache_bytes"] * 2 == out["cache_bytes"]
    wide = json.loads(vivace("run", "--estimate", "--json", "--weights", "float32")[0])
    assert wide["weight_bytes"] == 2 * out["weight_bytes"]
    assert "working space" in vivace("run", "--estimate")[0]


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(vivace: Vivace) -> None:
    out, err = vivace("run", "--context", "16", "word " * 40, code=2)
    assert out == ""
    assert re.search(r"the prompt has \d\d tokens but the context holds 16", err)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "0"], "context is 0"),
        (["--context", "4096"], "context is 4096: expected"),
        (["--threads", "0"], "threads is 0"),
        (["--threads", "-3"], "threads is -3"),
        (["--logit-bias", "5000:1"], "logit_bias is 5000: expected token ids below 4096"),
        (["--stop-token-ids", "4096"], "stop_token_ids is 4096"),
    ],
)
def test_wrong_numbers_are_refused_in_one_line(
    vivace: Vivace, options: list[str], message: str
) -> None:
    out, err = vivace("run", *options, QUESTION, code=2)
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_a_model_without_a_template_takes_plain_prompts(vivace: Vivace, llm: LLM) -> None:
    bare = Path("bare")
    bare.mkdir()
    for file in llm.model.path.iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).symlink_to(file)
    out, err = vivace("run", "./bare", QUESTION, code=2)
    assert (out, err) == (
        "",
        "error: ./bare has no chat template: --raw continues a plain prompt\n",
    )
    assert vivace("run", "./bare", "--raw", QUESTION)[0] == vivace("run", "--raw", QUESTION)[0]
    assert "system message" in vivace("run", "--raw", "--system", "Hi.", QUESTION, code=2)[1]


def test_no_torch_after_an_answer() -> None:
    code = (
        "import sys; from vivace.cli import main\n"
        f"assert main(['run', {QUESTION!r}]) == 0\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_a_reader_that_leaves_is_no_error() -> None:
    options = "--ignore-eos --max-tokens 400 hello </dev/null | head -c 1"
    command = f"{' '.join(COMMAND)} run {options}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert (len(done.stdout), done.stderr) == (1, "")


def test_interrupting_an_answer_exits_with_130() -> None:
    options = ["run", "--ignore-eos", "--max-tokens", "2000", "hello"]
    process = subprocess.Popen(
        [*COMMAND, *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)  # the answer has begun
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert process.stderr.read() == b""


# ---------------------------------------------------------------- chat


class Terminal:
    """Lines that somebody types, and what the chat writes."""

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)
        self.written = ""

    def read(self, _: str) -> str:
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)

    def write(self, text: str) -> None:
        self.written += text


def talk(llm: LLM, *lines: str, **flags: str) -> tuple[Chat, Terminal]:
    terminal = Terminal(*lines)
    chat = Chat(llm, resolve(flags, {}, []), terminal.read, terminal.write)
    chat.talk()
    return chat, terminal


def test_a_chat_remembers(llm: LLM) -> None:
    chat, terminal = talk(llm, "Hello", QUESTION, system="Be brief.")
    first = llm.chat([{"role": "system", "content": "Be brief."}, user("Hello")]).text
    second = llm.chat(chat.messages[:-1]).text
    assert [m["role"] for m in chat.messages] == ["system", *["user", "assistant"] * 2]
    assert terminal.written == f"{first}\n{second}\n"
    assert chat.messages[-1]["content"] == second


def test_chat_commands(llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "talk.json"
    chat, _ = talk(
        llm, "/system Be kind.", "/set max_tokens 3", QUESTION, "/stats", f"/save {saved}", "/clear"
    )
    notes = capsys.readouterr().err
    assert "max_tokens = 3" in notes
    assert "answers  1, 3 tokens" in notes
    assert re.search(r"context  \d+ of 2048 tokens", notes)
    assert chat.messages == [{"role": "system", "content": "Be kind."}]

    again, terminal = talk(
        llm, f"/load {saved}", "/set", "and then?", "/system", "/help", "/bye", "never"
    )
    notes = capsys.readouterr().err
    assert [m["role"] for m in again.messages] == ["system", *["user", "assistant"] * 2]
    assert again.messages[1] == user(QUESTION)
    assert "max_tokens = 3" in notes  # settings came back with the conversation
    assert "Be kind." in notes
    assert all(name in notes for name in ("/set", "/save", "/load", "/stats", "/clear", "/bye"))
    assert terminal.lines == ["never"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sett x 1", "no command /sett: did you mean /set"),
        ("/set temprature 1", "no sampling setting 'temprature': did you mean temperature"),
        ("/set temperature hot", "temperature is 'hot': expected a number"),
        ("/set temperature -1", "temperature is -1.0: expected"),
        ("/set n 2", "a chat has one answer at a time"),
        ("/save", "/save needs a file name"),
        ("/save nowhere/x.json", "nowhere/x.json: No such file"),
        ("/load", "/load needs a file name"),
        ("/load none.json", "none.json"),
        ("/load bad.json", "bad.json"),
    ],
)
def test_a_wrong_command_does_not_end_the_chat(
    llm: LLM, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    Path("bad.json").write_text('{"messages": [{"role": 1}]}')
    chat, _ = talk(llm, line, "Hello")
    assert message in capsys.readouterr().err
    assert len(chat.messages) == 2


def test_a_chat_says_what_cut_an_answer(
    llm: LLM, small: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(llm, "Hello", max_tokens="3", ignore_eos="true")
    assert capsys.readouterr().err.endswith("[stopped at max_tokens: a higher one allows more]\n")
    talk(small, "Hello", ignore_eos="true")
    assert capsys.readouterr().err.endswith("[the context is full: all 64 tokens are used]\n")


@pytest.fixture(scope="module")
def small() -> Iterator[LLM]:
    with LLM("tiny", max_context=64) as model:
        yield model


LONG = "one two three four five six seven eight nine ten"


def test_a_full_context_stops_the_chat_and_says_so(
    small: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    chat, _ = talk(small, *[LONG] * 5, max_tokens="8")
    notes = capsys.readouterr().err
    assert re.search(r"error: the context is full \(\d+ of 64 tokens\): /clear starts over", notes)
    assert 2 <= len(chat.messages) < 10
    before = len(chat.messages)
    chat, _ = talk(small, *[LONG] * (before // 2), LONG, "/clear", LONG, max_tokens="8")
    assert len(chat.messages) == 2


def test_the_oldest_turns_go_when_asked(small: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"{LONG} {number}" for number in range(5)]
    chat, _ = talk(small, *lines, system="Hi.", max_tokens="8", at_full_context="drop-oldest")
    assert "forgot the oldest turn" in capsys.readouterr().err
    assert chat.messages[0] == {"role": "system", "content": "Hi."}
    kept = [m["content"] for m in chat.messages if m["role"] == "user"]
    assert kept == lines[-len(kept) :]
    assert len(kept) < 5
    assert chat.messages[-1]["role"] == "assistant"

    before = list(chat.messages)
    terminal = Terminal(" ".join([LONG] * 6))
    chat._read = terminal.read
    chat.talk()
    assert re.search(r"this message alone has \d+ tokens", capsys.readouterr().err)
    assert chat.messages == before


def test_ctrl_c_stops_the_answer_not_the_chat(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    chat, terminal = talk(llm)
    terminal.lines = [
        "/set ignore_eos true",
        "/set max_tokens 500",
        "Hello",
        "/set max_tokens 3",
        "You?",
    ]

    def write(text: str) -> None:
        terminal.write(text)
        if len(terminal.written) > 20 and "stopped" not in terminal.written:
            terminal.written += "stopped"
            os.kill(os.getpid(), signal.SIGINT)

    chat._write = write
    chat.talk()
    assert "[stopped]" in capsys.readouterr().err
    assert len(chat.messages) == 4
    assert 20 < len(chat.messages[1]["content"]) < 200  # what was seen stays in the history
    assert chat.messages[3]["content"]


def test_a_chat_in_a_real_terminal() -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "run", "--max-tokens", "3"], stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    try:
        _read_until(ours, b">>> ")
        os.write(ours, b"Hello\n")
        answer = _read_until(ours, b">>> ")
        assert len(answer.splitlines()) >= 3  # the typed line, the answer, the next prompt
        os.write(ours, b"/bye\n")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _read_until(descriptor: int, end: bytes) -> bytes:
    seen = b""
    deadline = time.monotonic() + 60
    while end not in seen:
        ready, _, _ = select.select([descriptor], [], [], max(0, deadline - time.monotonic()))
        assert ready, seen
        seen += os.read(descriptor, 4096)
    return seen


# ---------------------------------------------------------------- eval

TEXT = "def read(path):\n    with open(path) as file:\n        return file.read()\n" * 6


def evaluated(vivace: Vivace, *arguments: str) -> dict[str, Any]:
    Path("text.txt").write_text(TEXT)
    return json.loads(vivace("eval", *arguments, "--json")[0])


def test_perplexity_is_that_of_the_scores(vivace: Vivace, llm: LLM) -> None:
    scores = [score.logprob for score in llm.score(TEXT)]
    result = evaluated(vivace, "tiny", "--perplexity", "text.txt")
    assert result["num_tokens"] == len(scores)
    assert result["nll"] == pytest.approx(-sum(scores) / len(scores), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["nll"]))
    assert (result["num_windows"], result["interval"]) == (1, None)


def test_windows_of_a_smaller_context(vivace: Vivace) -> None:
    whole = evaluated(vivace, "--perplexity", "text.txt")
    options = ("--perplexity", "text.txt", "--context", "32")
    apart = evaluated(vivace, *options)
    close = evaluated(vivace, *options, "--stride", "8")
    assert whole["num_tokens"] == apart["num_tokens"] == close["num_tokens"]
    assert whole["num_windows"] < apart["num_windows"] < close["num_windows"]
    assert apart["interval"]["low"] < apart["perplexity"] < apart["interval"]["high"]
    assert whole["nll"] < close["nll"] < apart["nll"]  # more in view, less surprise


def test_divergence_from_another_plan(vivace: Vivace) -> None:
    Path("same.toml").write_text('[schedulers]\nname = "chunked"\nchunk_size = 7\n')
    Path("exact.toml").write_text('weight_formats = "float32"\nkv_stores = "float32"\n')
    same = evaluated(vivace, "tiny", "--kl", "same.toml", "text.txt")
    assert (same["mean"], same["max"], same["top1_agreement"]) == (0, 0, 1)
    other = evaluated(vivace, "--kl", "exact.toml", "text.txt", "--context", "32")
    assert 0 < other["mean"] < other["p99"] <= other["max"] < 0.5
    assert other["interval"]["low"] <= other["mean"] <= other["interval"]["high"]
    assert 0.9 < other["top1_agreement"] <= 1
    none = evaluated(
        vivace, "--kl", "exact.toml", "text.txt", "--weights", "float32", "--kv", "float32"
    )
    assert none["max"] == 0
    Path("text.txt").write_text(TEXT)
    assert "same top-1" in vivace("eval", "--kl", "exact.toml", "text.txt")[0]


def test_a_text_of_no_token_to_predict_is_refused(vivace: Vivace) -> None:
    Path("text.txt").write_text(TEXT)
    out, err = vivace("eval", "--perplexity", "text.txt", "--context", "1", code=2)
    assert out == ""
    assert err.count("\n") == 1
    assert "--stride" in vivace("eval", "--help")[0]
    _, err = vivace("eval", "--perplexity", "text.txt", "--stride", "5000", code=2)
    assert "stride is 5000: expected 1 to 2047" in err


# ---------------------------------------------------------------- the readme


def test_the_readmes_python_runs() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})
