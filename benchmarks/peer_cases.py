"""What `benchmarks.peers` runs and what is wanted of it, as data: a new format is a new line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks import shapes

MODELS = {"llama-3.2-1b": shapes.LLAMA_3_2_1B, "qwen2.5-0.5b": shapes.QWEN_2_5_0_5B}


@dataclass(frozen=True)
class Case:
    """An engine with a file.

    Cases of one group are in memory together and take turns; ratios are taken inside a group.
    """

    name: str
    group: str
    engine: str  # a module of benchmarks.engines
    file: str  # "hf", or a name in peer_files.FILES
    weights: Any = None  # as `LLM` takes them: a format, or a list with those of some roles


INT4 = {"name": "int4", "group_size": 32}
INT2 = [{"name": "int2", "group_size": 64}, INT4 | {"role": "head"}]
CASES = (
    Case("Vivace int4", "4 bits", "vivace", "hf", INT4),
    Case("Vivace int2, head int4", "4 bits", "vivace", "hf", INT2),
    Case("Vivace Q4_0", "4 bits", "vivace", "q4_0.gguf"),  # the file that llama.cpp has
    Case("llama.cpp Q4_0", "4 bits", "llama_cpp", "q4_0.gguf"),
    Case("OpenVINO int4", "4 bits", "openvino", "openvino-int4"),
    Case("Vivace int8", "8 bits", "vivace", "hf", "int8"),
    Case("llama.cpp Q8_0", "8 bits", "llama_cpp", "q8_0.gguf"),
    Case("OpenVINO int8", "8 bits", "openvino", "openvino-int8"),
    Case("Vivace bfloat16", "16 bits", "vivace", "hf", "bfloat16"),
    Case("llama.cpp F16", "16 bits", "llama_cpp", "f16.gguf"),
    Case("llama.cpp BF16", "16 bits", "llama_cpp", "bf16.gguf"),
    Case("transformers bfloat16", "16 bits", "transformers", "hf"),
)
COMPARED = ("Vivace int4", "Vivace int8", "Vivace bfloat16")  # in README, with their groups


@dataclass(frozen=True)
class Decode:
    """Steps that add a token to each of some sequences."""

    name: str
    num_sequences: int = 1
    context: int = 128
    num_steps: int = 8
    cases: tuple[str, ...] | None = None  # only these: a long prompt takes minutes of two cores

    @property
    def counts_cache(self) -> bool:
        """Whether a step's cache is part of what it is said to read."""
        return self.context > 1024


LONG = (
    "Vivace int4",
    "llama.cpp Q4_0",
    "OpenVINO int4",
    "Vivace bfloat16",
    "llama.cpp BF16",
    "transformers bfloat16",
)
PREFILL, PREFILL_TOKENS = "prefill 512", 512
DECODES = (
    Decode("decode 1", num_steps=12),
    Decode("decode 4", 4),
    Decode("decode 8", 8),
    Decode("decode 16", 16),
    Decode("decode 1 at 16k", context=16384, cases=LONG),
)
QUICK = ("decode 1", "decode 8")  # with --quick


Results = dict[str, Any]  # of one model, as `peers.json` has them


@dataclass(frozen=True)
class Goal:
    """A figure made of a run's results, and what it should be; a KeyError says it was not run."""

    title: str
    value: Callable[[Results], float]
    at_least: float | None = None
    at_most: float | None = None

    def evaluate(self, results: Results) -> dict[str, Any] | None:
        try:
            value = self.value(results)
        except KeyError:
            return None
        limits = {"at_least": self.at_least, "at_most": self.at_most}
        return {"title": self.title, "value": value} | limits


def _median(results: Results, case: str, key: str, measure: str | None = None) -> float:
    found = results["cases"][case][key]
    return (found if measure is None else found[measure])["median"]


def _ratio(measure: str, ours: str, theirs: str) -> Callable[[Results], float]:
    def value(results: Results) -> float:
        rate = "tokens_per_second"
        return _median(results, ours, rate, measure) / _median(results, theirs, rate, measure)

    return value


def _share(measure: str, case: str) -> Callable[[Results], float]:
    return lambda results: _median(results, case, "share_of_read_floor", measure)


def _cost(num_sequences: int, case: str) -> Callable[[Results], float]:
    """Seconds of a step of so many rows over those of a step of one."""

    def value(results: Results) -> float:
        rates = results["cases"][case]["tokens_per_second"]
        many, one = rates[f"decode {num_sequences}"]["median"], rates["decode 1"]["median"]
        return num_sequences * one / many

    return value


def _prefill_share(limit: str, case: str) -> Callable[[Results], float]:
    def value(results: Results) -> float:
        found = results["cases"][case]
        peak = results["limits"][found["group"]]["operations_per_second"][limit]["median"]
        return found["prefill_operations_per_second"] / peak

    return value


def _memory_beyond(case: str) -> Callable[[Results], float]:
    return lambda results: results["cases"][case]["memory"]["beyond_weights_and_cache_bytes"] / 1e6


def _goals() -> tuple[Goal, ...]:
    goals = []
    ratios = (
        ("decode 1", "Vivace int4", "llama.cpp Q4_0", 1.15),
        ("decode 1", "Vivace int4", "OpenVINO int4", 1.5),
        ("decode 1", "Vivace int8", "llama.cpp Q8_0", 1.0),
        ("decode 1", "Vivace int8", "OpenVINO int8", 1.0),
        ("decode 1", "Vivace int2, head int4", "Vivace int4", 1.35),
        ("decode 1", "Vivace Q4_0", "llama.cpp Q4_0", None),
        ("decode 1", "Vivace bfloat16", "llama.cpp F16", None),
        ("decode 1", "Vivace bfloat16", "llama.cpp BF16", None),
        ("decode 1", "Vivace bfloat16", "transformers bfloat16", None),
        ("decode 16", "Vivace int4", "llama.cpp Q4_0", 2.0),
        ("decode 16", "Vivace int4", "OpenVINO int4", None),
        ("decode 16", "Vivace Q4_0", "llama.cpp Q4_0", None),
        ("decode 16", "Vivace bfloat16", "llama.cpp BF16", None),
        (PREFILL, "Vivace int4", "llama.cpp Q4_0", 2.0),
        (PREFILL, "Vivace int4", "OpenVINO int4", 1.4),
        (PREFILL, "Vivace Q4_0", "llama.cpp Q4_0", None),
        (PREFILL, "Vivace int8", "OpenVINO int8", None),
        (PREFILL, "Vivace bfloat16", "transformers bfloat16", 1.05),
        (PREFILL, "Vivace bfloat16", "llama.cpp BF16", None),
    )
    for measure, ours, theirs, least in ratios:
        title = f"{measure}: {ours} ÷ {theirs}"
        goals.append(Goal(title, _ratio(measure, ours, theirs), at_least=least))
    for case in ("Vivace int4", "Vivace int8", "Vivace bfloat16"):
        for measure in ("decode 1", "decode 1 at 16k"):
            title = f"{measure}: {case}, share of the read floor"
            goals.append(Goal(title, _share(measure, case), at_least=0.9))
    for count, most in ((4, 1.35), (8, 1.7)):
        title = f"step of {count} rows ÷ step of 1: Vivace int4"
        goals.append(Goal(title, _cost(count, "Vivace int4"), at_most=most))
    for limit, case, least in (
        ("int8 in oneDNN", "Vivace int8", 0.75),
        ("int8", "Vivace int8", None),
        ("int8", "Vivace int4", None),
        ("bfloat16", "Vivace bfloat16", None),
    ):
        name = limit if "oneDNN" in limit else f"peak of {limit}"
        title = f"{PREFILL}: {case}, share of the {name}"
        goals.append(Goal(title, _prefill_share(limit, case), at_least=least))
    start = partial(_median, case="Vivace int4", key="start_seconds")
    goals.append(Goal("start to first token: Vivace int4, seconds", start, at_most=0.5))
    for case in ("Vivace int4", "Vivace int8", "Vivace bfloat16"):
        title = f"memory beyond weights and cache: {case}, MB"
        goals.append(Goal(title, _memory_beyond(case), at_most=120))
    return tuple(goals)


GOALS = _goals()
