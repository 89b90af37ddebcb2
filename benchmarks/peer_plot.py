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
STYLES = ("-", "--", ":", "-.")


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
    names = list(found["cases"])[::-1]
    rates = [found["cases"][name]["tokens_per_second"][measure] for name in names]
    medians = [rate["median"] for rate in rates]
    spread = [
        [rate["median"] - rate["min"] for rate in rates],
        [rate["max"] - rate["median"] for rate in rates],
    ]
    colours = [COLOURS[found["cases"][name]["engine"]] for name in names]
    axis.barh(names, medians, xerr=spread, color=colours, capsize=3)
    if measure == "decode 1":
        shares = [found["cases"][name]["share_of_read_floor"][measure]["median"] for name in names]
        floors = [median / share for median, share in zip(medians, shares, strict=True)]
        axis.plot(floors, names, "k|", markersize=18, label="read floor")
        axis.legend()
    axis.set_title(title)
    axis.set_xlabel("tokens per second")


def _batches(axis: Any, found: dict[str, Any], title: str) -> None:
    counts = {d.name: d.num_sequences for d in DECODES if not d.counts_cache}
    used: dict[str, int] = {}
    for name, case in found["cases"].items():
        points = [
            (counts[measure], rate["median"])
            for measure, rate in case["tokens_per_second"].items()
            if measure in counts
        ]
        index = used[case["engine"]] = used.get(case["engine"], -1) + 1
        style = STYLES[index % len(STYLES)]
        axis.plot(
            *zip(*points, strict=True),
            color=COLOURS[case["engine"]],
            linestyle=style,
            marker="o",
            label=name,
        )
    axis.set_title(title)
    axis.set_xlabel("sequences")
    axis.set_ylabel("tokens per second")
    axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
