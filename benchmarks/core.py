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

PREFILL, CONTEXT, DECODE = 512, 128, 12


def vivace_worker(folder: str, threads: int) -> None:
    from vivace import LLM, SamplingParams

    llm = LLM(folder, threads=threads, max_context=1024)

    def run(num_prompt: int, num_new: int, offset: int) -> dict[str, Any]:
        prompt = [(i * 7919 + offset) % 100_000 for i in range(num_prompt)]
        params = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True)
        timing = llm.generate(prompt, params).timing
        return {"prefill": timing.prefill_seconds, "decode": timing.decode_seconds}

    harness.serve(
        {
            "run": run,
            "memory": lambda: {"peak_bytes": harness.peak_memory_bytes()},
        },
        {"cache_bytes": llm.cache_bytes, "weight_bytes": llm.weight_bytes},
    )


def floor_worker(threads: int) -> None:
    """Read bandwidth and peak, in a process whose buffers count for nobody."""
    from vivace import _native

    harness.serve(
        {
            "read": lambda: {"bytes_per_second": _native.read_bandwidth(0.25, threads)},
            "peak": lambda: {"flops": _native.peak_flops("bfloat16", 0.25, threads)},
        },
        {},
    )


def transformers_worker(folder: str, threads: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def run(num_prompt: int, num_new: int, offset: int) -> dict[str, Any]:
        tokens = torch.tensor([[(i * 7919 + offset) % 100_000 for i in range(num_prompt)]])
        start = time.perf_counter()
        out = model(tokens, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        middle = time.perf_counter()
        for _ in range(num_new - 1):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return {"prefill": middle - start, "decode": time.perf_counter() - middle}

    harness.serve({"run": run, "memory": lambda: {"peak_bytes": harness.peak_memory_bytes()}}, {})


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
    arguments = (str(folder), str(threads))
    ours = harness.Worker("vivace", "benchmarks.core", "worker-vivace", *arguments)
    peer = harness.Worker("transformers", "benchmarks.core", "worker-transformers", *arguments)
    limits = harness.Worker("floor", "benchmarks.core", "worker-floor", *arguments)
    cases: dict[str, dict[str, list[float]]] = {
        "vivace": {"prefill": [], "decode": []},
        "transformers": {"prefill": [], "decode": []},
    }
    floors: list[float] = []
    peaks: list[float] = []
    for index in range(-1, rounds):  # round -1 warms up
        for worker in (ours, peer):
            before = limits.ask(do="read")["bytes_per_second"]
            decode = worker.ask(do="run", num_prompt=CONTEXT, num_new=DECODE, offset=index + 1)
            after = limits.ask(do="read")["bytes_per_second"]
            prefill = worker.ask(do="run", num_prompt=PREFILL, num_new=1, offset=1000 + index)
            if index < 0:
                continue
            if worker is ours:
                floors.append((before + after) / 2)
                peaks.append(limits.ask(do="peak")["flops"])
            cases[worker.name]["decode"].append((DECODE - 1) / decode["decode"])
            cases[worker.name]["prefill"].append(PREFILL / prefill["prefill"])
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
            flops = 2 * (results["bytes_per_token"] / 2 - 128256 * 2048)  # per token, head apart
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
    if len(sys.argv) > 3 and sys.argv[1] == "worker-vivace":
        vivace_worker(sys.argv[2], int(sys.argv[3]))
    elif len(sys.argv) > 3 and sys.argv[1] == "worker-transformers":
        transformers_worker(sys.argv[2], int(sys.argv[3]))
    elif len(sys.argv) > 3 and sys.argv[1] == "worker-floor":
        floor_worker(int(sys.argv[3]))
    else:
        main()
