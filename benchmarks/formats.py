"""What each weight format costs in quality: `tiny`, rounded to nearest, against float32.

    python -m benchmarks.formats [--sequences 64]

Held-out exercises and text, the same rows as `benchmarks.agreement`. Writes
benchmarks/results/formats.json, formats.png and the table in docs/formats.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import table
from benchmarks.agreement import LENGTH, differences, held_out
from benchmarks.harness import machine, save
from vivace import LLM
from vivace.registry import Seam

GROUPWISE = ("int8", "int4", "int3", "int2")


def configurations() -> list[dict[str, Any]]:
    """Every technique of the seam with its defaults, and the group-wise ones in their variants."""
    names = [name for name in Seam("vivace.techniques.weight_formats").names() if name != "stored"]
    found: list[dict[str, Any]] = [{"name": name} for name in names if name != "table"]
    if "table" in names:
        from vivace.techniques.weight_formats.table import PRESETS

        found += [{"name": "table", "preset": preset} for preset in PRESETS]
    found += [
        {"name": name, "group_size": size} for name in GROUPWISE for size in (32, 64, 128)
    ]
    found += [
        {"name": name, "group_size": 64, "symmetric": False} for name in GROUPWISE[1:]
    ]
    unique = {label(config): config for config in found}
    return list(unique.values())


def label(config: dict[str, Any]) -> str:
    technique = Seam("vivace.techniques.weight_formats").create(**config)
    options = technique.options()
    if config["name"] in GROUPWISE:
        size = options["group_size"]
        kind = "" if options["symmetric"] else ", zeros"
        return f"{config['name']}, {'a row' if size == 'row' else f'groups of {size}'}{kind}"
    extra = [str(value) for key, value in config.items() if key != "name"]
    return " ".join([config["name"], *extra])


def measure(config: dict[str, Any], sequences: np.ndarray) -> tuple[np.ndarray, float]:
    """Logits [n, LENGTH - 1, vocab] and bits per weight, scales and all."""
    with LLM("tiny", weights=config, kv="float32", max_context=LENGTH) as llm:
        logits = [np.concatenate([b.copy() for b in llm.logits(ids.tolist())]) for ids in sequences]
        refs = {*llm.graph.linears(), llm.graph.embedding.weight}
        num_weights = sum(int(np.prod(ref.shape)) for ref in refs)
        bits = 8 * llm.weight_bytes / num_weights
    return np.stack(logits)[:, : LENGTH - 1], bits


def perplexity(logits: np.ndarray, sequences: np.ndarray, rows: np.ndarray) -> float:
    chosen = logits[rows].astype(np.float64)
    targets = sequences[:, 1:][rows]
    top = chosen.max(-1)
    log_sum = np.log(np.exp(chosen - top[:, None]).sum(-1)) + top
    return float(np.exp((log_sum - chosen[np.arange(len(targets)), targets]).mean()))


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 6))
    for name, values in results["formats"].items():
        if values["text"]["kl_mean"] <= 0:
            continue
        axis.plot(values["bits_per_weight"], values["text"]["kl_mean"], "o", markersize=4)
        axis.annotate(
            name, (values["bits_per_weight"], values["text"]["kl_mean"]), fontsize=6,
            xytext=(3, 2), textcoords="offset points",
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks([2, 3, 4, 5, 6, 8, 16], ["2", "3", "4", "5", "6", "8", "16"])
    axis.set_yscale("log")
    axis.set_xlabel("bits per weight")
    axis.set_ylabel("KL from float32, nats per token of text")
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sequences", type=int, default=64)
    arguments = parser.parse_args()
    sequences, rows = held_out(arguments.sequences)
    truth, bits = measure({"name": "float32"}, sequences)
    formats: dict[str, Any] = {}
    for config in configurations():
        logits, bits = measure(config, sequences)
        values: dict[str, Any] = {"config": config, "bits_per_weight": bits}
        values |= {part: differences(truth[chosen], logits[chosen]) for part, chosen in rows.items()}
        values["perplexity"] = perplexity(logits, sequences, rows["text"])
        formats[label(config)] = values
        print(f"{label(config):32} {bits:6.3f} bits  KL {values['text']['kl_mean']:.2e}", flush=True)
    command = "python -m benchmarks.formats " + " ".join(sys.argv[1:])
    num_rows = {name: int(chosen.sum()) for name, chosen in rows.items()}
    results = {"command": command.strip(), "machine": machine(), "rows": num_rows} | {
        "formats": dict(sorted(formats.items(), key=lambda item: item[1]["bits_per_weight"]))
    }
    path = save("formats", results)
    plot(results, path.with_suffix(".png"))
    table.main()


if __name__ == "__main__":
    main()
