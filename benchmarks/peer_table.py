"""The figures of `benchmarks.peers` in Markdown."""

from __future__ import annotations

from typing import Any

from benchmarks.peer_cases import PREFILL

BATCHES = ("decode 4", "decode 8", "decode 16")
HEAD = (
    "case",
    "GB per token",
    "prefill 512, tok/s",
    "decode 1, tok/s",
    "GB/s",
    "of read floor",
    "decode 4 / 8 / 16, tok/s",
    "decode at 16k, tok/s (GB/s)",
    "start, s",
    "peak memory, GB",
)


def peers_table(peers: dict[str, Any]) -> str:
    """A table of cases and one of goals for each model, with what they were measured on."""
    parts = []
    for model, found in peers["models"].items():
        if not found["cases"]:
            continue
        parts += [f"**{model}**", "", *_cases(found), ""]
        parts += [f"Left out: {name} ({_line(why)})." for name, why in found["skipped"].items()]
        parts += ["", *_goals(found["goals"]), "", _limits(found), ""]
    versions = {
        case["engine"].replace("_", "."): case["version"]
        for found in peers["models"].values()
        for case in found["cases"].values()
    }
    machine = peers["machine"]
    parts.append(
        f"Random weights, {peers['threads']} threads, medians of {peers['rounds']} rounds in which "
        f"the engines of a group took turns (decode 1 and prefill: smallest to largest); "
        f"{machine['cpu']}, {machine['cores']} cores, best instruction set "
        f"{machine['instruction_sets'][-1]}; "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}; "
        f"{machine['date']}, `{peers['command']}`. "
        "[What is compared](docs/benchmarks.md)."
    )
    return "\n".join(parts)


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _line(text: str) -> str:
    return text.strip().splitlines()[-1].rstrip(".")


def _cases(found: dict[str, Any]) -> list[str]:
    rows = [_row(HEAD), "|---" * len(HEAD) + "|"]
    for name, case in found["cases"].items():
        rates = case["tokens_per_second"]
        long = ""
        if "decode 1 at 16k" in rates:
            read = case["bytes_per_second"]["decode 1 at 16k"] / 1e9
            long = f"{rates['decode 1 at 16k']['median']:.1f} ({read:.1f})"
        batches = [f"{rates[b]['median']:.0f}" if b in rates else "–" for b in BATCHES]
        cells = (
            name,
            f"{case['weight_bytes'] / 1e9:.3f}",
            _spread(rates[PREFILL], 0),
            _spread(rates["decode 1"], 1),
            f"{case['bytes_per_second']['decode 1'] / 1e9:.1f}",
            f"{case['share_of_read_floor']['decode 1']['median']:.0%}",
            " / ".join(batches),
            long,
            f"{case['start_seconds']['median']:.2f}",
            f"{case['memory']['peak_bytes'] / 1e9:.2f}",
        )
        rows.append(_row(cells))
    return rows


def _goals(goals: list[dict[str, Any]]) -> list[str]:
    if not goals:
        return []
    rows = [_row(("what", "measured", "wanted")), "|---|---|---|"]
    for goal in goals:
        wanted = ""
        if goal["at_least"] is not None:
            wanted = f"at least {goal['at_least']:g}"
        elif goal["at_most"] is not None:
            wanted = f"at most {goal['at_most']:g}"
        rows.append(_row((goal["title"], f"{goal['value']:.2f}", wanted)))
    return rows


def _limits(found: dict[str, Any]) -> str:
    bandwidth = found["read_bandwidth_bytes_per_second"]
    read = "{median:.1f} ({min:.1f} to {max:.1f})".format_map(
        {key: bandwidth[key] / 1e9 for key in ("median", "min", "max")}
    )
    operations = ", ".join(
        f"{kind} {values['median'] / 1e9:.0f}"
        for kind, values in found["operations_per_second"].items()
    )
    busy = found["busy_share_before_rounds"]["median"]
    return (
        f"Read bandwidth {read} GB/s; 10⁹ operations per second: {operations}; used by other "
        f"programs before the rounds: {busy:.0%} of the processors."
    )


def _spread(values: dict[str, Any], digits: int) -> str:
    low, middle, high = (f"{values[key]:.{digits}f}" for key in ("min", "median", "max"))
    return f"{middle} ({low} to {high})"
