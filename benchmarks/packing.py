"""Packed weights: seconds to quantize, to load and to the first token, and the memory it takes.

    python -m benchmarks.packing [--scratch DIR] [--rounds N] [--threads N]

A Llama-3.2-1B shape in bfloat16 is quantized to int4 in groups of 32; then every round starts a
fresh process that loads the directory and generates one token, the page cache warm. Two more run
at once to show what they share. Writes benchmarks/results/packing.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import harness, shapes

CONTEXT = 1024


def worker(folder: str, threads: int) -> None:
    start = time.perf_counter()
    from vivace import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    imported = time.perf_counter()
    llm = LLM(folder, threads=threads, max_context=CONTEXT)
    loaded = time.perf_counter()
    llm.generate(list(range(1, 9)), params)
    done = time.perf_counter()
    ready = {
        "import": imported - start,
        "load": loaded - imported,
        "first_token": done - loaded,
        "weight_bytes": llm.weight_bytes,
        "cache_bytes": llm.cache_bytes,
        "peak_bytes": harness.memory()["peak_bytes"],
    }
    harness.serve({"memory": memory}, ready)


def memory() -> dict[str, Any]:
    """Bytes resident in this process, by who else may have them."""
    found = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        if name.removesuffix(":") in (
            "Rss",
            "Pss",
            "Shared_Clean",
            "Private_Clean",
            "Private_Dirty",
        ):
            found[name.removesuffix(":").lower() + "_bytes"] = int(value) * 1024
    return found


def quantize_seconds(source: Path, folder: Path, rounds: int) -> tuple[list[float], int]:
    """Seconds of `vivace quantize`, the start of the program and the disk included; peak bytes."""
    seconds, peak = [], 0
    program = str(Path(sys.executable).parent / "vivace")
    for _ in range(rounds):
        shutil.rmtree(folder, ignore_errors=True)
        start = time.perf_counter()
        process = subprocess.Popen(
            [program, "quantize", str(source), "--format", "int4", "--group", "32", "-o", folder],
            stdout=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds.append(time.perf_counter() - start)
        if status:
            raise RuntimeError("vivace quantize failed")
        peak = max(peak, usage.ru_maxrss * 1024)
    return seconds, peak


def pack_seconds(source: Path, rounds: int) -> list[float]:
    """Seconds to pack all matrices in memory, by the library alone."""
    from vivace.blocks import matrix_roles
    from vivace.models.loading import load_model
    from vivace.registry import seams
    from vivace.techniques.weight_formats.base import matrix_of

    model, int4 = load_model(source), seams()["weight_formats"].create("int4")
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        packed = [int4.pack(matrix_of(model.weights, ref)) for ref in matrix_roles(model.graph)]
        seconds.append(time.perf_counter() - start)
        del packed
    return seconds


def measure(source: Path, folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    quantizing, quantizing_peak = quantize_seconds(source, folder, 3)
    starts: dict[str, list[float]] = {"import": [], "load": [], "first_token": [], "to_token": []}
    options = {"folder": str(folder), "threads": threads}
    for index in range(-1, rounds):  # round -1 fills the page cache
        one = harness.Worker("vivace", "benchmarks.packing", **options)
        one.close()
        if index >= 0:
            for key in ("import", "load", "first_token"):
                starts[key].append(one.ready[key])
            starts["to_token"].append(one.ready["load"] + one.ready["first_token"])
    first, second = (
        harness.Worker(name, "benchmarks.packing", **options) for name in ("first", "second")
    )
    weight_bytes, cache_bytes = first.ready["weight_bytes"], first.ready["cache_bytes"]
    results = {
        "shape": "Llama-3.2-1B, random weights, int4 in groups of 32",
        "threads": threads,
        "pack_seconds": harness.summary(pack_seconds(source, 3)),
        "quantize_seconds": harness.summary(quantizing),
        "quantize_peak_bytes": quantizing_peak,
        "start_seconds": {key: harness.summary(values) for key, values in starts.items()},
        "memory": {
            "weight_bytes": weight_bytes,
            "cache_bytes": cache_bytes,
            "peak_bytes": first.ready["peak_bytes"],
            "beyond_weights_and_cache_mb": (first.ready["peak_bytes"] - weight_bytes - cache_bytes)
            / 1e6,
            "two_processes": [first.ask(do="memory"), second.ask(do="memory")],
        },
    }
    for one in (first, second):
        one.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", default=os.path.join(tempfile.gettempdir(), "vivace-bench"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    scratch = Path(options.scratch)
    source = shapes.write_checkpoint(scratch / "llama-3.2-1b", shapes.LLAMA_3_2_1B)
    results = measure(source, scratch / "llama-3.2-1b-int4", options.threads, options.rounds)
    path = harness.save("packing", results)
    print(f"pack      {results['pack_seconds']['median']:.2f} s")
    print(f"quantize  {results['quantize_seconds']['median']:.2f} s with the disk")
    print(f"start     {results['start_seconds']['to_token']['median']:.3f} s from LLM() to a token")
    beyond = results["memory"]["beyond_weights_and_cache_mb"]
    print(f"memory    {beyond:.0f} MB beyond weights + cache")
    print(f"written {path}")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("{"):  # as harness.Worker gives them
        worker(**json.loads(sys.argv[1]))
    else:
        main()
