"""The core against its floor and transformers: a Llama-3.2-1B shape in bfloat16, one run.

    python -m benchmarks.core [--scratch DIR] [--rounds N] [--threads N]

Both engines run in processes of their own and take turns; the read bandwidth is measured before
and after each decode, and the mean of the two is its floor. Writes benchmarks/results/core.json,
core.png and the table in README.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import harness, shapes, table

PREFILL, CONTEXT, DECODE = 512, 128, 11


def start_seconds(command: list[str], *, to_end: bool, runs: int = 7) -> list[float]:
    """From process start to the first byte on stdout, or to the end of the process."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, bufsize=0, cwd=harness.ROOT
        ) as process:
            assert process.stdout is not None
            first = process.stdout.read(1)
            if to_end:
                process.communicate()
            seconds.append(time.perf_counter() - start)
            process.kill()
        if not first:
            raise RuntimeError(f"{command} printed nothing")
    return seconds


def measure(folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    options = {"path": str(folder), "threads": threads, "max_context": 1024}
    ours = harness.Worker("vivace", "benchmarks.engines.vivace", **options)
    peer = harness.Worker("transformers", "benchmarks.engines.transformers", **options)
    limits = harness.Worker("floor", "benchmarks.engines.floor", threads=threads)
    cases: dict[str, dict[str, list[float]]] = {
        "vivace": {"prefill": [], "decode": []},
        "transformers": {"prefill": [], "decode": []},
    }
    floors: list[float] = []
    peaks: list[float] = []
    for index in range(-1, rounds):  # round -1 warms up
        for worker in (ours, peer):
            before = limits.ask(do="read")["bytes_per_second"]
            steps = worker.ask(do="decode", num_sequences=1, context=CONTEXT, num_steps=DECODE)
            after = limits.ask(do="read")["bytes_per_second"]
            prefill = worker.ask(do="prefill", num_tokens=PREFILL, offset=1000 + index)
            if index < 0:
                continue
            if worker is ours:
                floors.append((before + after) / 2)
                peaks.append(limits.ask(do="peak", kind="bfloat16")["flops"])
            cases[worker.name]["decode"].append(DECODE / sum(steps["seconds"]))
            cases[worker.name]["prefill"].append(PREFILL / prefill["seconds"])
    weight_bytes, cache_bytes = ours.ready["weight_bytes"], ours.ready["cache_bytes"]
    peak = ours.ask(do="memory")["peak_bytes"]
    share = [
        rate * weight_bytes / floor
        for rate, floor in zip(cases["vivace"]["decode"], floors, strict=True)
    ]
    results = {
        "shape": "Llama-3.2-1B, bfloat16, random weights",
        "threads": threads,
        "tokens_per_second": {
            name: {key: harness.summary(values) for key, values in case.items()}
            for name, case in cases.items()
        },
        "read_bandwidth_bytes_per_second": harness.summary(floors),
        "peak_bfloat16_flops": harness.summary(peaks),
        "bytes_per_token": weight_bytes,
        "decode_share_of_read_floor": harness.summary(share),
        "decode_ratio_to_transformers": _ratio(cases, "decode"),
        "prefill_ratio_to_transformers": _ratio(cases, "prefill"),
        "memory": {
            "peak_bytes": peak,
            "weight_bytes": weight_bytes,
            "cache_bytes": cache_bytes,
            "beyond_weights_and_cache_mb": (peak - weight_bytes - cache_bytes) / 1e6,
            "transformers_peak_bytes": peer.ask(do="memory")["peak_bytes"],
        },
    }
    for worker in (ours, peer, limits):
        worker.close()
    return results


def _ratio(cases: dict[str, dict[str, list[float]]], key: str) -> float:
    return statistics.median(cases["vivace"][key]) / statistics.median(cases["transformers"][key])


def measure_starts() -> dict[str, Any]:
    """Process start to first token of `vivace run tiny`, and to the end of `--help`."""
    program = str(Path(sys.executable).parent / "vivace")
    run = [program, "run", "tiny", "Hello", "--temperature", "0"]
    start_seconds(run, to_end=False, runs=1)
    help_seconds = start_seconds([program, "--help"], to_end=True)
    return {
        "run_tiny_to_first_token_seconds": harness.summary(start_seconds(run, to_end=False)),
        "help_seconds": harness.summary(help_seconds),
    }


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    rates = results["tokens_per_second"]
    for axis, key, title in zip(
        axes, ("decode", "prefill"), ("decode, 1 sequence", f"prefill {PREFILL}"), strict=True
    ):
        names = list(rates)
        medians = [rates[name][key]["median"] for name in names]
        spread = [
            [rates[n][key]["median"] - rates[n][key]["min"] for n in names],
            [rates[n][key]["max"] - rates[n][key]["median"] for n in names],
        ]
        axis.bar(names, medians, yerr=spread, color=["#3366aa", "#bbbbbb"], capsize=4)
        axis.set_title(title)
        axis.set_ylabel("tokens per second")
        if key == "decode":
            bandwidth = results["read_bandwidth_bytes_per_second"]["median"]
            floor = bandwidth / results["bytes_per_token"]
            axis.axhline(floor, color="black", linestyle="--", linewidth=1, label="read floor")
        else:
            flops = shapes.operations(shapes.LLAMA_3_2_1B, PREFILL) / PREFILL
            peak = results["peak_bfloat16_flops"]["median"] / flops
            axis.axhline(peak, color="black", linestyle="--", linewidth=1, label="bf16 peak")
        axis.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", default=os.path.join(tempfile.gettempdir(), "vivace-bench"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    folder = shapes.write_checkpoint(Path(options.scratch) / "llama-3.2-1b", shapes.LLAMA_3_2_1B)
    results = measure(folder, options.threads, options.rounds) | measure_starts()
    path = harness.save("core", results)
    plot(results, path.with_suffix(".png"))
    table.main()
    print(f"decode  {results['decode_share_of_read_floor']['median']:.0%} of the read floor")
    print(f"decode  {results['decode_ratio_to_transformers']:.2f} x transformers")
    print(f"prefill {results['prefill_ratio_to_transformers']:.2f} x transformers")
    print(
        f"memory  {results['memory']['beyond_weights_and_cache_mb']:.0f} MB beyond weights + cache"
    )
    print(f"written {path}")


if __name__ == "__main__":
    main()
