"""Packed weights: seconds to quantize, to load and to the first token, and what processes share.

    python -m benchmarks.packing [--scratch DIR] [--rounds N] [--threads N] [--quick]

A Llama-3.2-1B shape in bfloat16 is quantized to int4 in groups of 32; then every round starts a
fresh process that loads the directory and generates one token, the page cache warm. Two more run
at once to show what they share. Writes benchmarks/results/packing.json and the table in
docs/benchmarks.md; with --quick the model has two layers and nothing is written.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import harness, shapes, table

SMALL = shapes.LLAMA_3_2_1B | {"num_hidden_layers": 2, "vocab_size": 8192}
PARTS = ("import", "load", "first_token")  # of a start
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
    seconds = (imported - start, loaded - imported, done - loaded)
    ready = dict(zip(PARTS, seconds, strict=True)) | {"weight_bytes": llm.weight_bytes}
    harness.serve({"resident": resident}, ready)


def resident() -> dict[str, Any]:
    """Bytes of this process in memory, by who else may have them."""
    found = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.replace(":", "").split()
        if name in ("Rss", "Pss", "Shared_Clean", "Private_Clean", "Private_Dirty"):
            found[f"{name.lower()}_bytes"] = int(value) * 1024
    return found


def quantize_seconds(source: Path, folder: Path, rounds: int) -> tuple[list[float], int]:
    """Seconds of `vivace quantize`, the start of the program and the disk included; peak bytes."""
    seconds, peak = [], 0
    command = [*harness.VIVACE, "quantize", str(source), "--format", "int4", "--group", "32"]
    for _ in range(rounds):
        shutil.rmtree(folder, ignore_errors=True)
        start = time.perf_counter()
        process = subprocess.Popen(
            [*command, "-o", str(folder)], stdout=subprocess.DEVNULL, cwd=harness.ROOT
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
    from vivace.models.matrices import matrix_of
    from vivace.registry import seams

    model, int4 = load_model(source), seams()["weight_formats"].create("int4")
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        packed = [int4.pack(matrix_of(model.weights, ref)) for ref in matrix_roles(model.graph)]
        seconds.append(time.perf_counter() - start)
        del packed
    return seconds


def measure(source: Path, folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    num_packings = min(rounds, 3)
    quantizing, quantizing_peak = quantize_seconds(source, folder, num_packings)
    starts: dict[str, list[float]] = {key: [] for key in (*PARTS, "to_token")}
    options = {"folder": str(folder), "threads": threads}
    for index in range(-1, rounds):  # round -1 fills the page cache
        one = harness.Worker("benchmarks.packing", **options)
        one.close()
        if index >= 0:
            for key in PARTS:
                starts[key].append(one.ready[key])
            starts["to_token"].append(one.ready["load"] + one.ready["first_token"])
    both = [harness.Worker("benchmarks.packing", **options) for _ in range(2)]
    results = {
        "shape": "Llama-3.2-1B, random weights, int4 in groups of 32",
        "threads": threads,
        "weight_bytes": both[0].ready["weight_bytes"],
        "pack_seconds": harness.summary(pack_seconds(source, num_packings)),
        "quantize_seconds": harness.summary(quantizing),
        "quantize_peak_bytes": quantizing_peak,
        "start_seconds": {key: harness.summary(values) for key, values in starts.items()},
        "two_processes": [one.ask(do="resident") for one in both],
    }
    for one in both:
        one.close()
    return results


def main() -> None:
    parser = harness.argument_parser("packing", __doc__, rounds=9)
    harness.add_scratch(parser)
    options = parser.parse_args()
    name = "llama-small" if options.is_quick else "llama-3.2-1b"
    config = SMALL if options.is_quick else shapes.LLAMA_3_2_1B
    source = shapes.write_checkpoint(options.scratch / name / "hf", config)
    rounds = 1 if options.is_quick else options.rounds
    results = measure(source, options.scratch / name / "int4", options.threads, rounds)
    print(f"pack      {results['pack_seconds']['median']:.2f} s")
    print(f"quantize  {results['quantize_seconds']['median']:.2f} s with the disk")
    print(f"start     {results['start_seconds']['to_token']['median']:.3f} s from LLM() to a token")
    for one in results["two_processes"]:
        print(f"resident  {one['rss_bytes'] / 1e6:.0f} MB, {one['pss_bytes'] / 1e6:.0f} its share")
    if not options.is_quick:
        print(f"written {harness.save('packing', results)}")
        table.main()


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("{"):  # as harness.Worker gives them
        worker(**json.loads(sys.argv[1]))
    else:
        main()
