"""Results as Markdown: tables, spreads, and what a figure was measured on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def lines_of_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return [lines[0], "|---" * (lines[0].count("|") - 1) + "|", *lines[1:]]


def spread(values: dict[str, Any], digits: int, factor: float = 1.0) -> str:
    """The median, and from the smallest to the largest."""
    low, middle, high = (f"{values[key] * factor:.{digits}f}" for key in ("min", "median", "max"))
    return f"{middle} ({low} to {high})"


def machine(results: dict[str, Any]) -> str:
    found = results["machine"]
    sets = found["instruction_sets"]
    return f"{found['cpu']}, {found['cores']} cores, best instruction set {sets[-1]}"


def made_by(results: dict[str, Any]) -> str:
    return f"{results['machine']['date']}, `{results['command']}`"
