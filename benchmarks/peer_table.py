"""The figures of `benchmarks.peers` in Markdown: all of them, and the short table of README."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.markdown import lines_of_table, machine, made_by, spread
from benchmarks.peer_cases import COMPARED, PREFILL

BATCHES = ("decode 4", "decode 8", "decode 16")
LONG = "decode 1 at 16k"
HEAD = (
    "case",
    "GB per token",
    "prefill 512, tok/s",
    "decode 1, tok/s",
    "GB/s",
    "of read floor",
    "decode 4 / 8 / 16, tok/s",
    "decode at 16k, tok/s",
    "GB/s",
    "of read floor",
    "start, s",
    "peak memory, GB",
)
ENGINES = {"llama_cpp": "llama.cpp", "openvino": "OpenVINO", "transformers": "transformers"}


def peers_table(peers: dict[str, Any]) -> str:
    """A table of cases and one of goals for each model, with what they were measured on."""
    parts = []
    for model, found in peers["models"].items():
        parts += [f"**{model}**", "", *lines_of_table(HEAD, _cases(found)), ""]
        if found["skipped"]:
            parts += [f"Left out: {_reasons(found['skipped'])}.", ""]
        if found["goals"]:
            parts += [*lines_of_table(("what", "measured", "wanted"), _goals(found["goals"])), ""]
        parts += [*(_limits(group, limits) for group, limits in found["limits"].items()), ""]
    return "\n".join([*parts, f"{_measured_on(peers)}."])


def comparison_table(peers: dict[str, Any]) -> str:
    """The first model: Vivace's main cases beside the best of each other engine at as many bits."""
    model, found = next(iter(peers["models"].items()))
    own = [found["cases"][name] for name in COMPARED if name in found["cases"]]
    measures = (
        ("decode 1", "decode, 1 sequence"),
        ("decode 16", "decode, 16 sequences"),
        (LONG, "decode at 16k tokens"),
        (PREFILL, "prefill, 512 tokens"),
    )
    rows = []
    for measure, title in measures:
        rows += [
            _beside(title, case, found, partial(_rate, measure=measure))
            for case in own
            if measure in case["tokens_per_second"]
        ]
    for case in own[:1]:
        rows.append(_beside("GB of weights read for a token", case, found, _weights_gb, min))
        rows.append(_beside("seconds to the first token", case, found, _start_seconds, min))
        rows.append(_beside("peak memory, GB", case, found, _peak_gb, min))
    missed = [
        f"{goal['title']} {goal['value']:.2f} ({_wanted(goal)})"
        for goal in found["goals"]
        if not _is_reached(goal)
    ]
    notes = [
        f"Shape {model}. In brackets: how many times as good Vivace is; bold: where it is worse"
    ]
    if missed:
        notes.append(f"Wanted and missed: {'; '.join(missed)}")
    if found["failed"]:
        notes.append(f"Failed: {_reasons(found['failed'])}")
    notes += [_measured_on(peers), "[All figures, and what is compared](docs/benchmarks.md)"]
    table = lines_of_table(("tokens per second", "Vivace", *ENGINES.values()), rows)
    return "\n".join([*table, "", ". ".join(notes) + "."])


def _reasons(found: dict[str, str]) -> str:
    return "; ".join(f"{name} ({why})" for name, why in found.items())


def _beside(
    title: str,
    own: dict[str, Any],
    found: dict[str, Any],
    value: Callable[[dict[str, Any]], float],
    best: Callable[[list[float]], float] = max,
) -> list[str]:
    """A row: a case's value, and the best of each other engine in its group with the ratio."""
    cells = [f"{title}, {own['group']}", _short(value(own))]
    for engine in ENGINES:
        others = [
            case
            for case in found["cases"].values()
            if case["group"] == own["group"] and case["engine"] == engine
        ]
        if not others:
            cells.append("")
            continue
        other = best([value(case) for case in others])
        ratio = value(own) / other if best is max else other / value(own)
        text = f"{ratio:.2f} ×" if ratio >= 1 else f"**{ratio:.2f} ×**"
        cells.append(f"{_short(other)} ({text})")
    return cells


def _rate(case: dict[str, Any], measure: str) -> float:
    return case["tokens_per_second"][measure]["median"]


def _start_seconds(case: dict[str, Any]) -> float:
    return case["start_seconds"]["median"]


def _weights_gb(case: dict[str, Any]) -> float:
    return case["weight_bytes"] / 1e9


def _peak_gb(case: dict[str, Any]) -> float:
    return case["memory"]["peak_bytes"] / 1e9


def _short(value: float) -> str:
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _cases(found: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, case in found["cases"].items():
        rates = case["tokens_per_second"]
        cells = (
            name,
            f"{case['weight_bytes'] / 1e9:.3f}",
            spread(rates[PREFILL], 0),
            *_decode(case, "decode 1"),
            " / ".join(f"{rates[b]['median']:.0f}" if b in rates else "–" for b in BATCHES),
            *_decode(case, LONG),
            f"{case['start_seconds']['median']:.2f}",
            f"{case['memory']['peak_bytes'] / 1e9:.2f}",
        )
        rows.append(cells)
    for name, why in found["failed"].items():
        rows.append((name, f"failed: {why.replace('|', '/')}", *("" for _ in HEAD[2:])))
    return rows


def _decode(case: dict[str, Any], measure: str) -> tuple[str, str, str]:
    """Tokens and bytes per second, and the share of the floor; empty where it was not run."""
    rates = case["tokens_per_second"]
    if measure not in rates:
        return "", "", ""
    return (
        spread(rates[measure], 1),
        f"{case['bytes_per_second'][measure] / 1e9:.1f}",
        f"{case['share_of_read_floor'][measure]['median']:.0%}",
    )


def _is_reached(goal: dict[str, Any]) -> bool:
    value, least, most = goal["value"], goal["at_least"], goal["at_most"]
    return (least is None or value >= least) and (most is None or value <= most)


def _wanted(goal: dict[str, Any]) -> str:
    if goal["at_least"] is not None:
        return f"at least {goal['at_least']:g}"
    return "" if goal["at_most"] is None else f"at most {goal['at_most']:g}"


def _goals(goals: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Bold is what was missed."""
    rows = []
    for goal in goals:
        wanted = _wanted(goal) if _is_reached(goal) else f"**{_wanted(goal)}**"
        rows.append((goal["title"], f"{goal['value']:.2f}", wanted))
    return rows


def _limits(group: str, found: dict[str, Any]) -> str:
    bandwidth = found["read_bandwidth_bytes_per_second"]
    read = spread(bandwidth, 1, 1e-9)
    operations = ", ".join(
        f"{kind} {values['median'] / 1e9:.0f}"
        for kind, values in found["operations_per_second"].items()
    )
    busy = found["busy_share_before_rounds"]
    return (
        f"- While those of {group} ran: read bandwidth {read} GB/s; 10⁹ operations per second: "
        f"{operations}; used by other programs before the rounds: {busy['median']:.0%} of the "
        f"processors, at most {busy['max']:.0%}."
    )


def _measured_on(peers: dict[str, Any]) -> str:
    versions = {
        case["engine"]: f"{ENGINES.get(case['engine'], 'Vivace')} {case['version']}"
        for found in peers["models"].values()
        for case in found["cases"].values()
    }
    return (
        f"Random weights, {peers['threads']} threads, medians of {peers['rounds']} rounds in which "
        f"the engines of a group took turns; {machine(peers)}; {', '.join(versions.values())}; "
        f"{made_by(peers)}"
    )
