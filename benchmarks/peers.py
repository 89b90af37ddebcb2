"""Vivace against llama.cpp, OpenVINO and transformers: known shapes, random weights, one run.

    python -m benchmarks.peers [--models NAME ...] [--cases NAME ...] [--decodes NAME ...]
                               [--rounds N] [--threads N] [--scratch DIR] [--quick]

Every engine runs in a process of its own. Those of one group are loaded together and take turns at
each measurement, so that a ratio compares the same minute; the read bandwidth is measured before
and after each decode, and the mean of the two is its floor. `make peers` installs the peers; one
that is missing is said and left out, and so is one that fails on the way. Writes
benchmarks/results/peers.json, peers.png and the tables in README.md and docs/benchmarks.md, with
--quick nothing; docs/benchmarks.md says what the columns mean.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
from dataclasses import asdict, dataclass, field
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
START_CONTEXT = 1024  # of the processes whose start and memory are measured
# Prompts that fill a cache of Vivace, which holds two contexts; otherwise a part of it would count
# as memory that is in use, and is not.
NUM_FILLING_PROMPTS = 2 * START_CONTEXT // PREFILL_TOKENS


@dataclass(frozen=True)
class Options:
    scratch: Path
    threads: int
    rounds: int
    num_starts: int
    decodes: tuple[Decode, ...]

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
    start_seconds: list[float]
    memory: dict[str, int]
    rates: dict[str, list[float]] = field(default_factory=dict)  # tokens per second
    shares: dict[str, list[float]] = field(default_factory=dict)  # of the read floor
    failure: str | None = None  # why it takes no more turns

    @property
    def weight_bytes(self) -> int:
        """Read by each step: Vivace's as it stores them, others' as they are in the file."""
        return self.worker.ready.get("weight_bytes") or tensor_bytes(self.path)

    def bytes_per_step(self, decode: Decode) -> float:
        cache = decode.context * self.worker.ready["cache_bytes_per_token"]
        return self.weight_bytes + decode.counts_cache * decode.num_sequences * cache

    def ask(self, **request: Any) -> dict[str, Any] | None:
        """The worker's answer; None once it has failed, of which `failure` keeps the reason."""
        if self.failure is None:
            try:
                return self.worker.ask(**request)
            except harness.WorkerFailed as error:
                self.failure = reason(self.case, error)
        return None


class Limits:
    """What the machine can do while a group runs, measured all along."""

    def __init__(self, config: dict[str, Any], threads: int) -> None:
        self.floor = harness.Worker("benchmarks.engines.floor", threads=threads)
        self.onednn = None
        if importlib.util.find_spec("torch"):
            self.onednn = harness.Worker("benchmarks.engines.onednn", threads=threads)
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
            try:
                answer = self.onednn.ask(do="multiply", shapes=self.layer_shapes)
                found["int8 in oneDNN"] = answer["operations"]
            except harness.WorkerFailed as error:
                print(f"oneDNN: {error}", file=sys.stderr, flush=True)
                self.onednn = None
        for kind, value in found.items():
            if value is not None:
                self.operations.setdefault(kind, []).append(value)

    def summary(self) -> dict[str, Any]:
        return {
            "read_bandwidth_bytes_per_second": harness.summary(self.bandwidths),
            "busy_share_before_rounds": harness.summary(self.busy_shares),
            "operations_per_second": {k: harness.summary(v) for k, v in self.operations.items()},
        }

    def close(self) -> None:
        self.floor.close()
        if self.onednn:
            self.onednn.close()


# ------------------------------------------------------------------ measuring


def reason(case: Case, error: Exception) -> str:
    """Why a case is left out, in one line that is printed and kept: errors end with what it was."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = harness.without_folders(lines[-1]).rstrip(".")
    print(f"{case.name}: {text}", file=sys.stderr, flush=True)
    return text


def start(case: Case, path: Path, threads: int, max_context: int) -> harness.Worker:
    """The case's engine. Raises `WorkerFailed` with the reason where it does not start."""
    python = PYTHON.get(case.engine)
    options: dict[str, Any] = {"path": str(path), "threads": threads, "max_context": max_context}
    if case.weights is not None:
        options["weights"] = case.weights
    return harness.Worker(f"benchmarks.engines.{case.engine}", python, **options)


def open_subject(case: Case, model: str, options: Options) -> Subject:
    """Prepare a case's file, start its engine some times for their figures, and once to stay.

    Raises `NotInstalled`, or `RuntimeError` with the reason.
    """
    if case.engine in PYTHON:
        harness.require(PYTHON[case.engine])
    elif not importlib.util.find_spec(case.engine):
        raise harness.NotInstalled("not installed: pip installs it with vivace[bench]")
    path = prepare(options.scratch, model, case.file)
    seconds = []
    worker = start(case, path, options.threads, START_CONTEXT)  # keeps what later starts read
    for _ in range(options.num_starts):
        worker.close()
        worker = start(case, path, options.threads, START_CONTEXT)
        seconds.append(worker.ready["start_seconds"])
    for index in range(NUM_FILLING_PROMPTS):
        worker.ask(do="prefill", num_tokens=PREFILL_TOKENS, offset=1 + index)
    worker.ask(do="decode", num_sequences=1, context=128, num_steps=8)
    memory = worker.ask(do="memory")
    if "cache_bytes" in worker.ready:
        known = worker.ready["weight_bytes"] + worker.ready["cache_bytes"]
        memory |= {
            "cache_bytes": worker.ready["cache_bytes"],
            "beyond_weights_and_cache_bytes": memory["peak_bytes"] - known,
        }
    worker.close()
    worker = start(case, path, options.threads, options.max_context)
    return Subject(case, path, worker, seconds, memory)


def run_round(subjects: list[Subject], index: int, options: Options, limits: Limits) -> None:
    """Every measurement once, the subjects taking turns; the round -1 warms up."""
    limits.busy_shares.append(harness.busy_share())
    shift = index % len(subjects)
    subjects = subjects[shift:] + subjects[:shift]
    for subject in subjects:
        answer = subject.ask(do="prefill", num_tokens=PREFILL_TOKENS, offset=1000 + index)
        if answer and index >= 0:
            subject.rates.setdefault(PREFILL, []).append(PREFILL_TOKENS / answer["seconds"])
    for decode in options.decodes:
        for subject in subjects:
            if decode.cases is None or subject.case.name in decode.cases:
                run_decode(subject, decode, index >= 0, limits)
    limits.measure_operations()


def run_decode(subject: Subject, decode: Decode, is_kept: bool, limits: Limits) -> None:
    """Some steps, between two measurements of the read bandwidth."""
    before = limits.bandwidth()
    answer = subject.ask(
        do="decode",
        num_sequences=decode.num_sequences,
        context=decode.context,
        num_steps=decode.num_steps,
    )
    floor = (before + limits.bandwidth()) / 2
    if answer and is_kept:
        step = statistics.median(answer["seconds"])
        share = subject.bytes_per_step(decode) / step / floor
        subject.rates.setdefault(decode.name, []).append(decode.num_sequences / step)
        subject.shares.setdefault(decode.name, []).append(share)


@dataclass
class Outcome:
    """What came of a model's cases, by their names, and what the machine could do, by groups."""

    limits: dict[str, dict[str, Any]] = field(default_factory=dict)
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # why it was not there to be run
    failed: dict[str, str] = field(default_factory=dict)  # why it has no figures


def run_group(cases: list[Case], model: str, options: Options, outcome: Outcome) -> None:
    """Cases that are loaded together. One that fails is noted, and the others go on."""
    group, subjects = cases[0].group, []
    for case in cases:
        try:
            subjects.append(open_subject(case, model, options))
        except harness.NotInstalled as error:
            outcome.skipped[case.name] = reason(case, error)
        except RuntimeError as error:
            outcome.failed[case.name] = reason(case, error)
    limits = Limits(MODELS[model], options.threads)
    for index in range(-1, options.rounds):
        running = [subject for subject in subjects if subject.failure is None]
        if running:
            run_round(running, index, options, limits)
            print(f"{model}, {group}: round {index + 1} of {options.rounds}", flush=True)
            outcome.limits[group] = limits.summary()
    limits.close()
    for subject in subjects:
        if subject.failure is not None:
            outcome.failed[subject.case.name] = subject.failure
            continue
        outcome.cases[subject.case.name] = summarize(subject, MODELS[model], options)
        subject.worker.close()


def measure(model: str, cases: list[Case], options: Options) -> dict[str, Any]:
    """All groups of a model, one after the other."""
    config, outcome = MODELS[model], Outcome()
    for group in dict.fromkeys(case.group for case in cases):
        members = [case for case in cases if case.group == group]
        run_group(members, model, options, outcome)
    shape = {key: config[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size")}
    found = {"shape": shape} | asdict(outcome)
    goals = [goal.evaluate(found) for goal in GOALS]
    return found | {"goals": [goal for goal in goals if goal is not None]}


# ------------------------------------------------------------------ results


def summarize(subject: Subject, config: dict[str, Any], options: Options) -> dict[str, Any]:
    case, ready = subject.case, subject.worker.ready
    decodes = [decode for decode in options.decodes if decode.name in subject.rates]
    per_token = {d.name: subject.bytes_per_step(d) / d.num_sequences for d in decodes}
    rates = {name: harness.summary(values) for name, values in subject.rates.items()}
    operations = shapes.operations(config, PREFILL_TOKENS) / PREFILL_TOKENS
    return {
        "group": case.group,
        "engine": case.engine,
        "version": ready["version"],
        "settings": ready["settings"],
        "file": case.file,
        "weights": case.weights,
        "weight_bytes": subject.weight_bytes,
        "cache_bytes_per_token": ready["cache_bytes_per_token"],
        "bytes_per_token": per_token,
        "tokens_per_second": rates,
        "bytes_per_second": {n: per_token[n] * rates[n]["median"] for n in per_token},
        "share_of_read_floor": {n: harness.summary(v) for n, v in subject.shares.items()},
        "prefill_operations_per_second": operations * rates[PREFILL]["median"],
        "start_seconds": harness.summary(subject.start_seconds),
        "memory": subject.memory,
    }


def parse(arguments: list[str]) -> tuple[list[str], list[Case], Options, bool]:
    """Models, cases, options, and whether it is a short try."""
    parser = harness.argument_parser("peers", __doc__, rounds=7)
    harness.add_scratch(parser)
    names, decodes = [case.name for case in CASES], [decode.name for decode in DECODES]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--decodes", nargs="+", choices=decodes, metavar="NAME")
    given = parser.parse_args(arguments)
    chosen = given.decodes or (QUICK if given.is_quick else decodes)
    options = Options(
        given.scratch,
        given.threads,
        2 if given.is_quick else given.rounds,
        1 if given.is_quick else 3,
        tuple(decode for decode in DECODES if decode.name in chosen),
    )
    cases = [case for case in CASES if case.name in given.cases]
    return given.models, cases, options, given.is_quick


def main() -> None:
    models, cases, options, is_quick = parse(sys.argv[1:])
    results: dict[str, Any] = {
        "threads": options.threads,
        "rounds": options.rounds,
        "models": {model: measure(model, cases, options) for model in models},
    }
    if not any(found["cases"] for found in results["models"].values()):
        sys.exit("no case ran: nothing is written")
    if is_quick:
        print(peers_table(harness.described("peers", results)))
        return
    path = harness.save("peers", results)
    plot(results, path.with_suffix(".png"))
    table.main()
    print(f"written {path}")


if __name__ == "__main__":
    main()
