"""What each weight format costs in quality: `tiny`, rounded to nearest, against float32.

    python -m benchmarks.formats [--sequences 64]

Held-out exercises and text, chosen as in `benchmarks.agreement`. Writes
benchmarks/results/formats.json, formats.png and the table in docs/formats.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import table
from benchmarks.agreement import LENGTH, differences, held_out
from benchmarks.harness import save
from vivace import LLM
from vivace.registry import seams

GROUPWISE = ("int8", "int4", "int3", "int2")
PANELS = (  # of the plot: bits from, and below
    ("less than 4 bits", 0, 4),
    ("4 to 5 bits", 4, 5.5),
    ("6 to 16 bits", 5.5, 32),
)
FAMILIES = {  # colours, by the name of the technique
    "table": "#dd8833",
    "codebook": "#cc4466",
    "block_float": "#8855aa",
    "int": "#3366aa",
    "float": "#666666",
}
# Where a label may stand, in points from its own: beside it, then above and below in turn.
LABEL_PLACES = [
    (side * 7, sign * step) for step in range(0, 60, 5) for sign in (1, -1) for side in (1, -1)
]


def configurations() -> list[dict[str, Any]]:
    """Every technique of the seam with its defaults, and the group-wise ones in their variants."""
    names = [name for name in seams()["weight_formats"].names() if name != "stored"]
    found: list[dict[str, Any]] = [{"name": name} for name in names if name != "table"]
    if "table" in names:
        from vivace.techniques.weight_formats.table import PRESETS

        found += [{"name": "table", "preset": preset} for preset in PRESETS]
    found += [{"name": name, "group_size": size} for name in GROUPWISE for size in (32, 64, 128)]
    found += [{"name": name, "group_size": 64, "symmetric": False} for name in GROUPWISE[1:]]
    unique = {label(config): config for config in found}
    return list(unique.values())


def label(config: dict[str, Any]) -> str:
    options = seams()["weight_formats"].create(**config).options()
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
    """KL over bits, in panels: most formats have between 4 and 5 bits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(PANELS), figsize=(16, 6), width_ratios=(4, 5, 6), layout="constrained"
    )
    panels = []
    for axis, (title, low, high) in zip(axes, PANELS, strict=True):
        points = {
            name: (values["bits_per_weight"], values["text"]["kl_mean"])
            for name, values in results["formats"].items()
            if low <= values["bits_per_weight"] < high and values["text"]["kl_mean"] > 0
        }
        for name, point in points.items():
            axis.plot(*point, "o", color=colour(name), markersize=5)
        axis.set_yscale("log")
        axis.set_title(title)
        axis.set_xlabel("bits per weight")
        axis.margins(x=0.3, y=0.08)
        axis.grid(alpha=0.3)
        panels.append((axis, points))
    axes[0].set_ylabel("KL from float32, nats per token of text")
    figure.draw_without_rendering()  # panels have their places from here on
    for axis, points in panels:
        add_labels(axis, points)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def colour(name: str) -> str:
    return next((code for family, code in FAMILIES.items() if family in name), "black")


def add_labels(axis: Any, points: dict[str, tuple[float, float]]) -> None:
    """Names beside their points, at the nearest place that neither covers."""
    taken = {name: axis.transData.transform(point) for name, point in points.items()}
    boxes: list[Any] = []
    for name, point in sorted(points.items(), key=lambda item: -item[1][1]):
        label = axis.annotate(
            name, point, (0, 0), textcoords="offset points", fontsize=8, va="center"
        )
        label.set_color(colour(name))
        for x, y in LABEL_PLACES:
            label.set(position=(x, y), horizontalalignment="left" if x > 0 else "right")
            box = label.get_window_extent()
            is_inside = axis.bbox.contains(box.x0, box.y0) and axis.bbox.contains(box.x1, box.y1)
            wide = box.padded(6)  # a point is not only its middle
            is_covered = any(wide.contains(*taken[other]) for other in taken if other != name)
            if is_inside and not is_covered and not any(box.overlaps(other) for other in boxes):
                break
        boxes.append(label.get_window_extent())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sequences", type=int, default=64)
    arguments = parser.parse_args()
    sequences, rows = held_out(arguments.sequences)
    truth, _ = measure({"name": "float32"}, sequences)
    formats: dict[str, Any] = {}
    for config in configurations():
        logits, bits = measure(config, sequences)
        values: dict[str, Any] = {"config": config, "bits_per_weight": bits}
        values |= {
            part: differences(truth[chosen], logits[chosen]) for part, chosen in rows.items()
        }
        values["perplexity"] = perplexity(logits, sequences, rows["text"])
        formats[label(config)] = values
        print(
            f"{label(config):32} {bits:6.3f} bits  KL {values['text']['kl_mean']:.2e}", flush=True
        )
    results = {
        "rows": {name: int(chosen.sum()) for name, chosen in rows.items()},
        "formats": dict(sorted(formats.items(), key=lambda item: item[1]["bits_per_weight"])),
    }
    path = save("formats", results)
    plot(results, path.with_suffix(".png"))
    table.main()


if __name__ == "__main__":
    main()
