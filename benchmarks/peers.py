"""Vivace against llama.cpp, OpenVINO and transformers: known shapes, random weights, one run.

    python -m benchmarks.peers [--models NAME ...] [--cases NAME ...] [--decodes NAME ...]
                               [--rounds N] [--threads N] [--scratch DIR] [--quick]

Every engine runs in a process of its own. Those of one group are loaded together and take turns at
each measurement, so that a ratio compares the same minute; the read bandwidth is measured before
and after each decode, and the mean of the two is its floor. `make peers` installs the peers; one
that is missing is said and left out. Writes benchmarks/results/peers.json, peers.png and the table
in README.md, with --quick nothing; docs/benchmarks.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import harness, shapes, table
from benchmarks.peer_cases import (
    CASES,
    DECODES,
    GOALS,
    MODELS,
    PREFILL,
    PREFILL_TOKENS,
    QUICK,
    Case,
    Decode,
)
from benchmarks.peer_files import prepare, tensor_bytes
from benchmarks.peer_plot import plot
from benchmarks.peer_table import peers_table

PYTHON = {"llama_cpp": harness.LLAMA_CPP, "openvino": harness.OPENVINO}
PEAKS = ("bfloat16", "int8")


@dataclass(frozen=True)
class Options:
    scratch: Path
    threads: int
    rounds: int
    num_starts: int
    decodes: tuple[Decode, ...]
    is_quick: bool

    @property
    def max_context(self) -> int:
        """Of a worker that runs all the decodes, with room for what they add."""
        return max(4096, *(decode.context + 512 for decode in self.decodes))


@dataclass
class Subject:
    """A case whose engine runs, and what has been measured of it."""

    case: Case
    path: Path
    worker: harness.Worker
    starts: list[dict[str, Any]] = field(default_factory=list)
    rates: dict[str, list[float]] = field(default_factory=dict)  # tokens per second
    shares: dict[str, list[float]] = field(default_factory=dict)  # of the read floor

    @property
    def weight_bytes(self) -> int:
        """Read by each step: Vivace's as it stores them, others' as they are in the file."""
        return self.worker.ready.get("weight_bytes") or tensor_bytes(self.path)

    def bytes_per_step(self, decode: Decode) -> float:
        cache = decode.context * self.worker.ready["cache_bytes_per_token"]
        return self.weight_bytes + decode.counts_cache * decode.num_sequences * cache


class Limits:
    """What the machine can do, measured all along."""

    def __init__(self, config: dict[str, Any], threads: int) -> None:
        self.floor = harness.Worker("floor", "benchmarks.engines.floor", threads=threads)
        self.onednn = None
        if importlib.util.find_spec("torch"):
            self.onednn = harness.Worker("oneDNN", "benchmarks.engines.onednn", threads=threads)
        layer = {n: s for n, s in shapes.matrices(config).items() if ".layers.0." in n}
        self.layer_shapes = [(k, n) for n, k in layer.values()]
        self.bandwidths: list[float] = []
        self.busy_shares: list[float] = []
        self.operations: dict[str, list[float]] = {}

    def bandwidth(self) -> float:
        self.bandwidths.append(self.floor.ask(do="read")["bytes_per_second"])
        return self.bandwidths[-1]

    def measure_operations(self) -> None:
        found = {kind: self.floor.ask(do="peak", kind=kind)["flops"] for kind in PEAKS}
        if self.onednn:
            answer = self.onednn.ask(do="multiply", shapes=self.layer_shapes)
            found["int8 in oneDNN"] = answer["operations"]
        for kind, value in found.items():
            if value is not None:
                self.operations.setdefault(kind, []).append(value)

    def close(self) -> None:
        self.floor.close()
        if self.onednn:
            self.onednn.close()


# ------------------------------------------------------------------ measuring


def start(case: Case, path: Path, threads: int, max_context: int) -> harness.Worker:
    """The case's engine. Raises `RuntimeError` with the reason where it does not start."""
    python = PYTHON.get(case.engine)
    options: dict[str, Any] = {"path": str(path), "threads": threads, "max_context": max_context}
    if case.weights is not None:
        options["weights"] = case.weights
    return harness.Worker(case.name, f"benchmarks.engines.{case.engine}", python, **options)


def open_subject(case: Case, model: str, options: Options) -> Subject:
    """Prepare a case's file, start its engine some times for their figures, and once to stay."""
    if case.engine in PYTHON:
        harness.require(PYTHON[case.engine])
    elif not importlib.util.find_spec(case.engine):
        raise harness.NotInstalled("not installed: pip installs it with vivace[bench]")
    path = prepare(options.scratch, model, case.file)
    starts = []
    for _ in range(options.num_starts):
        worker = start(case, path, options.threads, 1024)
        worker.ask(do="prefill", num_tokens=PREFILL_TOKENS, offset=1)
        worker.ask(do="decode", num_sequences=1, context=128, num_steps=8)
        starts.append(worker.ready | worker.ask(do="memory"))
        worker.close()
    return Subject(case, path, start(case, path, options.threads, options.max_context), starts)


def open_group(
    cases: list[Case], model: str, options: Options, skipped: dict[str, str]
) -> list[Subject]:
    subjects = []
    for case in cases:
        try:
            subjects.append(open_subject(case, model, options))
        except (harness.NotInstalled, RuntimeError) as error:
            skipped[case.name] = str(error)
            print(f"{case.name}: {error}", file=sys.stderr, flush=True)
    return subjects


def run_round(subjects: list[Subject], index: int, options: Options, limits: Limits) -> None:
    """Every measurement once, the subjects taking turns; the round -1 warms up."""
    limits.busy_shares.append(harness.busy_share())
    shift = index % len(subjects)
    subjects = subjects[shift:] + subjects[:shift]
    for subject in subjects:
        answer = subject.worker.ask(do="prefill", num_tokens=PREFILL_TOKENS, offset=1000 + index)
        if index >= 0:
            subject.rates.setdefault(PREFILL, []).append(PREFILL_TOKENS / answer["seconds"])
    for decode in options.decodes:
        for subject in subjects:
            before = limits.bandwidth()
            seconds = subject.worker.ask(
                do="decode",
                num_sequences=decode.num_sequences,
                context=decode.context,
                num_steps=decode.num_steps,
            )["seconds"]
            floor = (before + limits.bandwidth()) / 2
            if index < 0:
                continue
            step = statistics.median(seconds)
            share = subject.bytes_per_step(decode) / step / floor
            subject.rates.setdefault(decode.name, []).append(decode.num_sequences / step)
            subject.shares.setdefault(decode.name, []).append(share)
    limits.measure_operations()


def measure(model: str, cases: list[Case], options: Options) -> dict[str, Any]:
    """All groups of a model, one after the other."""
    config = MODELS[model]
    limits = Limits(config, options.threads)
    skipped: dict[str, str] = {}
    results: dict[str, Any] = {}
    for group in dict.fromkeys(case.group for case in cases):
        members = [case for case in cases if case.group == group]
        subjects = open_group(members, model, options, skipped)
        for index in range(-1, options.rounds if subjects else -1):
            run_round(subjects, index, options, limits)
            print(f"{model}, {group}: round {index + 1} of {options.rounds}", flush=True)
        for subject in subjects:
            results[subject.case.name] = summarize(subject, config, options)
            subject.worker.close()
    limits.close()
    if not results:
        return {"cases": {}, "skipped": skipped, "goals": []}
    found = {
        "shape": {key: config[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size")},
        "read_bandwidth_bytes_per_second": harness.summary(limits.bandwidths),
        "busy_share_before_rounds": harness.summary(limits.busy_shares),
        "operations_per_second": {k: harness.summary(v) for k, v in limits.operations.items()},
        "cases": {case.name: results[case.name] for case in cases if case.name in results},
        "skipped": skipped,
    }
    goals = [goal.evaluate(found) for goal in GOALS]
    return found | {"goals": [goal for goal in goals if goal is not None]}


# ------------------------------------------------------------------ results


def summarize(subject: Subject, config: dict[str, Any], options: Options) -> dict[str, Any]:
    case, ready = subject.case, subject.worker.ready
    steps = {decode.name: subject.bytes_per_step(decode) for decode in options.decodes}
    per_token = {d.name: steps[d.name] / d.num_sequences for d in options.decodes}
    rates = {name: harness.summary(values) for name, values in subject.rates.items()}
    operations = shapes.operations(config, PREFILL_TOKENS) / PREFILL_TOKENS
    return {
        "engine": case.engine,
        "version": ready["version"],
        "file": case.file,
        "weights": case.weights,
        "weight_bytes": subject.weight_bytes,
        "cache_bytes_per_token": ready["cache_bytes_per_token"],
        "bytes_per_token": per_token,
        "tokens_per_second": rates,
        "bytes_per_second": {n: per_token[n] * rates[n]["median"] for n in per_token},
        "share_of_read_floor": {n: harness.summary(v) for n, v in subject.shares.items()},
        "prefill_operations_per_second": operations * rates[PREFILL]["median"],
        "start_seconds": harness.summary([start["start_seconds"] for start in subject.starts]),
        "memory": _memory(subject),
    }


def _memory(subject: Subject) -> dict[str, Any]:
    """Of the process that started last: one prompt and one sequence, in a small cache."""
    last = subject.starts[-1]
    memory = {key: last[key] for key in ("peak_bytes", "anonymous_bytes")}
    if "cache_bytes" in last:
        beyond = last["peak_bytes"] - subject.weight_bytes - last["cache_bytes"]
        memory |= {"cache_bytes": last["cache_bytes"], "beyond_weights_and_cache_bytes": beyond}
    return memory


def parse(arguments: list[str]) -> tuple[list[str], list[Case], Options]:
    parser = argparse.ArgumentParser("benchmarks.peers", description="See the module's docstring.")
    names = [case.name for case in CASES]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="NAME")
    decodes = [decode.name for decode in DECODES]
    parser.add_argument("--decodes", nargs="+", choices=decodes, default=decodes, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--scratch", default=os.path.join(tempfile.gettempdir(), "vivace-bench"))
    parser.add_argument(
        "--quick", action="store_true", help="2 rounds of the main measurements, printed"
    )
    given = parser.parse_args(arguments)
    options = Options(
        Path(given.scratch).resolve(),
        given.threads,
        2 if given.quick else given.rounds,
        1 if given.quick else 3,
        tuple(d for d in DECODES if d.name in (QUICK if given.quick else given.decodes)),
        given.quick,
    )
    return given.models, [case for case in CASES if case.name in given.cases], options


def main() -> None:
    models, cases, options = parse(sys.argv[1:])
    results: dict[str, Any] = {
        "threads": options.threads,
        "rounds": options.rounds,
        "models": {model: measure(model, cases, options) for model in models},
    }
    if not any(found["cases"] for found in results["models"].values()):
        sys.exit("no case ran: nothing is written")
    if options.is_quick:
        print(peers_table(harness.described("peers", results)))
        return
    path = harness.save("peers", results)
    plot(results, path.with_suffix(".png"))
    table.main()
    print(f"written {path}")


if __name__ == "__main__":
    main()
