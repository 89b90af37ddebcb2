"""The benchmarks: what is counted, an engine that fails on the way, and pages that are fresh."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import harness, peer_cases, peer_files, peers, shapes, table
from benchmarks.peer_cases import PREFILL, Case
from benchmarks.peer_plot import plot
from benchmarks.peer_table import comparison_table, peers_table
from tests.benchmark_engine import CACHE_BYTES_PER_TOKEN, SECONDS, WEIGHT_BYTES
from vivace import LLM

FLOOR = 8000.0  # bytes per second
ROUNDS = 2
SMALL = shapes.LLAMA_3_2_1B | {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


class FakeLimits(peers.Limits):
    """A machine that always does the same."""

    def __init__(self, config: dict[str, Any], threads: int) -> None:
        self.bandwidths: list[float] = []
        self.busy_shares: list[float] = []
        self.operations: dict[str, list[float]] = {}

    def bandwidth(self) -> float:
        self.bandwidths.append(FLOOR)
        return FLOOR

    def measure_operations(self) -> None:
        self.operations.setdefault("int8", []).append(1e12)

    def close(self) -> None:
        pass


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`run(decodes, **options by case)`: what `benchmarks.peers` saves of real worker processes."""

    def measured(decodes: tuple[str, ...], **engines: dict[str, Any]) -> dict[str, Any]:
        def open_subject(case: Case, model: str, options: peers.Options) -> peers.Subject:
            worker = harness.Worker("tests.benchmark_engine", **engines[case.name])
            return peers.Subject(case, Path("none"), worker, [0.5], {"peak_bytes": 2000})

        monkeypatch.setattr(peers, "open_subject", open_subject)
        monkeypatch.setattr(peers, "Limits", FakeLimits)
        monkeypatch.setattr(harness, "busy_share", lambda: 0.0)
        cases = [
            Case(name, "4 bits", "vivace" if name == "ours" else "llama_cpp", "hf")
            for name in engines
        ]
        chosen = tuple(
            replace(decode, cases=decode.cases and ("ours", "theirs"))
            for decode in peer_cases.DECODES
            if decode.name in decodes
        )
        options = peers.Options(Path("none"), 2, ROUNDS, 1, chosen)
        model = next(iter(peer_cases.MODELS))
        results = {"threads": 2, "rounds": ROUNDS} | {
            "models": {model: peers.measure(model, cases, options)}
        }
        return harness.described("peers", results)

    return measured


def found_in(results: dict[str, Any]) -> dict[str, Any]:
    (found,) = results["models"].values()
    return found


def test_rates_bytes_and_shares_are_of_what_a_step_reads(run: Any) -> None:
    case = found_in(run(("decode 1", "decode 4", "decode 1 at 16k"), ours={}))["cases"]["ours"]
    long = WEIGHT_BYTES + 16384 * CACHE_BYTES_PER_TOKEN
    assert case["bytes_per_token"] == {
        "decode 1": WEIGHT_BYTES,
        "decode 4": WEIGHT_BYTES / 4,
        "decode 1 at 16k": long,
    }
    rates = {name: values["raw"] for name, values in case["tokens_per_second"].items()}
    assert rates[PREFILL] == [512 / SECONDS] * ROUNDS
    assert rates["decode 4"] == [4 / SECONDS] * ROUNDS
    shares = {name: values["median"] for name, values in case["share_of_read_floor"].items()}
    step = WEIGHT_BYTES / SECONDS / FLOOR
    assert shares == {"decode 1": step, "decode 4": step, "decode 1 at 16k": long / SECONDS / FLOOR}


def test_a_decode_may_be_of_some_cases_only(run: Any) -> None:
    cases = found_in(run(("decode 1", "decode 1 at 16k"), ours={}, other={}))["cases"]
    assert "decode 1 at 16k" in cases["ours"]["tokens_per_second"]
    for figures in ("tokens_per_second", "bytes_per_token", "share_of_read_floor"):
        assert "decode 1 at 16k" not in cases["other"][figures]
        assert "decode 1" in cases["other"][figures]


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("killed_at", "its process was ended by SIGKILL"),
        ("fails_at", "ValueError: cannot read model.bin"),
    ],
)
def test_a_case_that_fails_on_the_way_is_named_and_the_others_go_on(
    run: Any, option: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    # After two decodes to warm up and two that count: in the last round.
    results = run(("decode 1", "decode 8"), ours={}, theirs={option: 4})
    found = found_in(results)
    assert found["failed"] == {"theirs": reason}
    assert list(found["cases"]) == ["ours"]
    rates = found["cases"]["ours"]["tokens_per_second"]
    assert [len(values["raw"]) for values in rates.values()] == [ROUNDS] * 3
    assert f"| theirs | failed: {reason} |" in peers_table(results)
    assert f"theirs: {reason}" in capfd.readouterr().err


def test_a_run_in_which_every_case_fails_ends(run: Any, capfd: pytest.CaptureFixture[str]) -> None:
    results = run(("decode 1",), theirs={"killed_at": 0})
    assert not found_in(results)["cases"]
    assert "| theirs | failed: its process" in peers_table(results)


def test_a_worker_that_does_not_start_says_why() -> None:
    with pytest.raises(harness.WorkerFailed, match="no_such_option"):
        harness.Worker("tests.benchmark_engine", no_such_option=1)


def test_any_choice_of_decodes_makes_tables_and_a_picture(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results = run(("decode 1 at 16k",), ours={}, theirs={})
    assert f"{1 / SECONDS:.1f}" in peers_table(results)
    monkeypatch.setattr("benchmarks.peer_table.COMPARED", ("ours",))
    assert "| decode at 16k tokens, 4 bits | 4.00 | 4.00 (1.00 ×) |" in comparison_table(results)
    plot(results, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 0


def test_goals_compare_cases_of_one_group() -> None:
    groups = {case.name: case.group for case in peer_cases.CASES}
    ratios = [goal.title.partition(": ")[2].split(" ÷ ") for goal in peer_cases.GOALS]
    ratios = [names for names in ratios if len(names) == 2]
    assert len(ratios) > 10
    for ours, theirs in ratios:
        assert groups[ours] == groups[theirs]


def test_a_format_of_the_head_counts_once_where_the_embedding_is_tied(tmp_path: Path) -> None:
    path = shapes.write_checkpoint(tmp_path / "hf", SMALL)
    (case,) = (case for case in peer_cases.CASES if case.weights == peer_cases.INT2)
    head = SMALL["vocab_size"] * SMALL["hidden_size"]
    body = sum(int(np.prod(shape)) for shape in shapes.matrices(SMALL).values())
    with LLM(path, weights=case.weights, max_context=64) as llm:
        assert llm.weight_bytes == body * 2.25 / 8 + head * 4.5 / 8


def test_tensor_bytes_are_those_behind_the_header(tmp_path: Path) -> None:
    save_file({"a": np.zeros((3, 5), np.float32)}, tmp_path / "model.safetensors")
    assert peer_files.tensor_bytes(tmp_path) == 60


def test_no_two_prompts_begin_alike() -> None:
    assert len({harness.prompt(1, offset)[0] for offset in range(2000)}) == 2000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--scratch /home/somebody/bench --quick", "--scratch bench --quick"),
        ("'/a/b.gguf': no such file", "'b.gguf': no such file"),
        ("decode 4 / 8 and 1/2", "decode 4 / 8 and 1/2"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
        ("relative/path", "relative/path"),
    ],
)
def test_folders_of_this_machine_are_not_told(text: str, expected: str) -> None:
    assert harness.without_folders(text) == expected


@pytest.mark.parametrize("path", sorted(harness.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_say_what_made_them_and_no_folders(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    results = json.loads(text)
    assert results["command"].startswith(f"python -m benchmarks.{path.stem}")
    assert {"cpu", "cores", "memory_gib", "versions", "date"} <= set(results["machine"])
    assert harness.without_folders(text) == text


def test_pages_are_what_the_results_make() -> None:
    for path, text in table.pages():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run python -m benchmarks.table"


def test_a_page_without_marks_is_refused() -> None:
    assert table.insert("a <!-- x -->old<!-- /x --> b", "x", "new") == (
        "a <!-- x -->\nnew\n<!-- /x --> b"
    )
    with pytest.raises(ValueError, match=re.escape("<!-- y -->")):
        table.insert("a <!-- x --><!-- /x --> b", "y", "new")


def test_a_short_try_has_few_measurements_unless_some_are_named() -> None:
    _, _, options, is_quick = peers.parse(["--quick"])
    assert is_quick
    assert tuple(decode.name for decode in options.decodes) == peer_cases.QUICK
    _, _, options, _ = peers.parse(["--quick", "--decodes", "decode 1 at 16k"])
    assert options.max_context > 16384
