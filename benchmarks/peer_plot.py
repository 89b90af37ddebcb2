"""The figures of `benchmarks.peers` as a picture: a row of panels per model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peer_cases import DECODES, PREFILL

COLOURS = {
    "vivace": "#3366aa",
    "llama_cpp": "#dd8833",
    "openvino": "#66aa55",
    "transformers": "#999999",
}
STYLES = {"4 bits": "-", "8 bits": "--", "16 bits": ":"}
MARKERS = "os^v"  # of an engine's cases in one group


def plot(results: dict[str, Any], path: Path) -> None:
    """Decode and prefill as bars, with the read floor of each file; batches as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = {name: found for name, found in results["models"].items() if found["cases"]}
    if not models:
        return
    figure, axes = pyplot.subplots(
        len(models), 3, figsize=(15, 4.5 * len(models)), squeeze=False, layout="constrained"
    )
    for (model, found), row in zip(models.items(), axes, strict=True):
        _bars(row[0], found, "decode 1", f"{model}: decode, 1 sequence")
        _bars(row[1], found, PREFILL, f"{model}: prefill, 512 tokens")
        _batches(row[2], found, f"{model}: decode, by sequences")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def _bars(axis: Any, found: dict[str, Any], measure: str, title: str) -> None:
    """Bars with their spread, downwards; decoding has its floor, which is of each file's bytes."""
    cases = [
        (name, case)
        for name, case in reversed(found["cases"].items())
        if measure in case["tokens_per_second"]
    ]
    names = [name for name, _ in cases]
    rates = [case["tokens_per_second"][measure] for _, case in cases]
    medians = [rate["median"] for rate in rates]
    spread = [
        [rate["median"] - rate["min"] for rate in rates],
        [rate["max"] - rate["median"] for rate in rates],
    ]
    colours = [COLOURS[case["engine"]] for _, case in cases]
    axis.barh(names, medians, xerr=spread, color=colours, capsize=3)
    if measure != PREFILL:
        shares = [case["share_of_read_floor"][measure]["median"] for _, case in cases]
        floors = [median / share for median, share in zip(medians, shares, strict=True)]
        axis.plot(floors, names, "k|", markersize=18, label="read floor")
        axis.legend(loc="lower right")
    axis.set_title(title)
    axis.locator_params(axis="x", nbins=5)
    axis.set_xlabel("tokens per second")


def _batches(axis: Any, found: dict[str, Any], title: str) -> None:
    """Lines over the number of sequences: colour is the engine, style the number of bits."""
    counts = {d.name: d.num_sequences for d in DECODES if not d.counts_cache}
    used: dict[tuple[str, str], int] = {}
    for name, case in found["cases"].items():
        points = [
            (counts[measure], rate["median"])
            for measure, rate in case["tokens_per_second"].items()
            if measure in counts
        ]
        key = case["engine"], case["group"]
        index = used[key] = used.get(key, -1) + 1
        axis.plot(
            *([values[i] for values in points] for i in (0, 1)),
            color=COLOURS[case["engine"]],
            linestyle=STYLES[case["group"]],
            marker=MARKERS[index],
            label=name,
        )
    axis.set_title(title)
    axis.set_xlabel("sequences")
    axis.set_xticks(sorted(counts.values()))
    axis.set_ylim(bottom=0)
    axis.set_ylabel("tokens per second")
    axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
