"""What benchmarks share: the machine, workers that take turns, statistics, results on disk."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, TextIO

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
PEERS = Path(os.environ.get("VIVACE_PEERS") or ROOT / ".venv-peers")
LLAMA_CPP = PEERS / "venv/bin/python"
OPENVINO = PEERS / "openvino/bin/python"


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


class Worker:
    """One engine in a process of its own, asked one thing at a time: JSON lines in and out."""

    def __init__(self, name: str, module: str, python: Path | None = None, **options: Any) -> None:
        self.name = name
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
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker {self.name} ended: {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


class Engine(Protocol):
    """What a worker of `benchmarks.engines` measures; made with the options of its `Worker`."""

    facts: dict[str, Any]  # for the worker's `ready`

    def prefill(self, num_tokens: int, offset: int) -> float:
        """Seconds of a prompt that nobody has seen, up to the logits of its last row."""
        ...

    def decode(self, num_sequences: int, context: int, num_steps: int) -> list[float]:
        """Seconds of each step that adds a token to every sequence of `context` tokens."""
        ...


def serve_engine(make: Callable[..., Engine]) -> None:
    """Serve an engine; `start_seconds` are those from its making to its first token."""
    out = _only_answers()
    options = json.loads(sys.argv[1])
    began = time.perf_counter()
    try:
        engine = make(**options)
        engine.prefill(8, 0)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=out, flush=True)
        sys.exit(1)
    ready = engine.facts | {"start_seconds": time.perf_counter() - began}
    handlers = {
        "prefill": lambda **how: {"seconds": engine.prefill(**how)},
        "decode": lambda **how: {"seconds": engine.decode(**how)},
        "memory": memory,
    }
    _serve(out, handlers, ready)


def serve(handlers: dict[str, Any], ready: dict[str, Any] | None = None) -> None:
    """The worker's side of `Worker`: `handlers[request["do"]](**rest)` returns a dictionary."""
    _serve(_only_answers(), handlers, ready or {})


def _only_answers() -> TextIO:
    """What was stdout; whatever libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


def _serve(out: TextIO, handlers: dict[str, Any], ready: dict[str, Any]) -> None:
    print(json.dumps(ready), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = handlers[request.pop("do")](**request)
        print(json.dumps(answer), file=out, flush=True)


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


def described(name: str, results: dict[str, Any]) -> dict[str, Any]:
    """Results with the command and the machine that they are of."""
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])
    return {"command": command, "machine": machine()} | results


def save(name: str, results: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(described(name, results), indent=1) + "\n")
    return path
