"""What benchmarks share: the machine, workers that take turns, statistics, results on disk."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
PEERS = Path(os.environ.get("PEERS") or ROOT / ".venv-peers").absolute()  # as in the Makefile
LLAMA_CPP = PEERS / "venv/bin/python"
OPENVINO = PEERS / "openvino/bin/python"
VIVACE = (sys.executable, "-m", "vivace.cli")  # the program


def machine() -> dict[str, Any]:
    """Processor, memory and versions: what a figure means nothing without."""
    from vivace import _native

    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    versions = {}
    for package in ("vivace", "numpy", "torch", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "instruction_sets": list(_native.isa_names()),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def summary(values: list[float]) -> dict[str, Any]:
    """Median and spread, with the raw repetitions beside them."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "raw": values,
    }


class WorkerFailed(RuntimeError):
    """A worker's process ended, or said that it cannot do what it was asked."""


class Worker:
    """One engine in a process of its own, asked one thing at a time: JSON lines in and out.

    Raises `WorkerFailed`, also from `ask`; the process has ended then.
    """

    def __init__(self, module: str, python: Path | None = None, **options: Any) -> None:
        self.process = subprocess.Popen(
            [str(python or sys.executable), "-m", module, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.ready = self._receive()

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it said before it ended is read below
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": _how_it_ended(self.process.wait())}
        if "error" in answer:
            self.close()
            raise WorkerFailed(answer["error"])
        return answer

    def close(self) -> None:
        """End the process; its output is no longer read."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def _how_it_ended(code: int) -> str:
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"


class Engine(Protocol):
    """What a worker of `benchmarks.engines` measures.

    It is made with `path`, `threads`, `max_context` (tokens that it has to hold, for those that
    ask beforehand) and options of its own.
    """

    facts: dict[str, Any]  # for the worker's `ready`: version, cache_bytes_per_token, settings

    def prefill(self, num_tokens: int, offset: int) -> float:
        """Seconds of a prompt that nobody has seen, up to the logits of its last row."""
        ...

    def decode(self, num_sequences: int, context: int, num_steps: int) -> list[float]:
        """Seconds of each step that adds a token to every sequence of `context` tokens."""
        ...


def serve_engine(make: Callable[..., Engine]) -> None:
    """Serve an engine; `start_seconds` are those from its making to its first token."""
    options = json.loads(sys.argv[1])

    def start() -> tuple[dict[str, Any], dict[str, Any]]:
        began = time.perf_counter()
        engine = make(**options)
        engine.prefill(8, 0)
        ready = engine.facts | {"start_seconds": time.perf_counter() - began}
        handlers = {
            "prefill": lambda **how: {"seconds": engine.prefill(**how)},
            "decode": lambda **how: {"seconds": engine.decode(**how)},
            "memory": memory,
        }
        return handlers, ready

    _serve(start)


def serve(handlers: dict[str, Any], ready: dict[str, Any] | None = None) -> None:
    """The worker's side of `Worker`: `handlers[request["do"]](**rest)` returns a dictionary."""
    _serve(lambda: (handlers, ready or {}))


def _serve(start: Callable[[], tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Answer until stdin ends. What goes wrong is the last answer; its trace goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print
    try:
        handlers, answer = start()
        print(json.dumps(answer), file=out, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            answer = handlers[request.pop("do")](**request)
            print(json.dumps(answer), file=out, flush=True)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=out, flush=True)
        raise


def busy_share() -> float:
    """Part of all processors' time that is in use now, when whoever asks waits: by others."""

    def ticks() -> tuple[int, int]:
        fields = Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
        counts = [int(field) for field in fields]
        idle = counts[3] + counts[4]
        return sum(counts) - idle, sum(counts)

    used, total = ticks()
    time.sleep(0.5)
    used_later, total_later = ticks()
    return (used_later - used) / max(total_later - total, 1)


def memory() -> dict[str, int]:
    """Of this process: the largest resident size so far, mapped files included; and what of the
    present one lies in no file."""
    sizes = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmHWM", "RssAnon"):
            sizes[name] = int(value.split()[0]) * 1024
    return {"peak_bytes": sizes["VmHWM"], "anonymous_bytes": sizes["RssAnon"]}


def prompt(num_tokens: int, offset: int) -> list[int]:
    """Token ids; no two offsets below 100,000 begin alike."""
    return [(i * 7919 + offset) % 100_000 for i in range(num_tokens)]


class NotInstalled(Exception):
    """An engine that is to be compared with is not here."""


def require(python: Path) -> None:
    """Raises `NotInstalled` where the peers' interpreter `python` is missing."""
    if not python.exists():
        raise NotInstalled("not installed: run make peers")


def run_quietly(command: Sequence[str | Path]) -> None:
    """Run a command from the root; raises `RuntimeError` with what it said where it fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr[-2000:].strip()}")


def without_folders(text: str) -> str:
    """Absolute paths down to their last names: where files lie on this machine is nobody's matter.

    Web addresses stay.
    """
    return re.sub(r"(?<![\w:/.])/(?:[^\s/:'\"`]+/)+", "", text)


def described(name: str, results: dict[str, Any]) -> dict[str, Any]:
    """Results with the command and the machine that they are of."""
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])
    return {"command": without_folders(command), "machine": machine()} | results


def save(name: str, results: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(described(name, results), indent=1) + "\n")
    return path


def argument_parser(name: str, doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """What the benchmarks that measure time have in common on the command line."""
    parser = argparse.ArgumentParser(
        f"python -m benchmarks.{name}", description=(doc or "").partition("\n")[0]
    )
    parser.add_argument("--rounds", type=_positive, default=rounds)
    parser.add_argument("--threads", type=_positive, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--quick", action="store_true", dest="is_quick", help="a short try: nothing is written"
    )
    return parser


def add_scratch(parser: argparse.ArgumentParser) -> None:
    """`--scratch DIR`, where models are written once."""
    scratch = Path(tempfile.gettempdir()) / "vivace-bench"
    parser.add_argument("--scratch", type=lambda text: Path(text).resolve(), default=scratch)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: expected 1 or more")
    return value
