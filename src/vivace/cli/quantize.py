"""`vivace quantize`: a model as a directory whose matrices are packed once and for all."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vivace.cli.options import command
from vivace.cli.output import format_bytes, print_json, print_table
from vivace.config import Settings
from vivace.errors import InvalidOption

if TYPE_CHECKING:
    from vivace.plan import Plan
    from vivace.techniques.weight_formats.base import Packed

__all__ = ["quantize"]


def _quantize(
    settings: Settings,
    model: str,
    format: str,
    group: str | None,
    out: str,
) -> None:
    """Write MODEL with its matrices packed, as a directory that is a model itself.

    MODEL is a directory of safetensors files, org/name on the hub, or a shipped name. A format is a
    weight_formats technique, with its options if there are any: int4:scale_type=bfloat16. Head,
    embedding and routers may have others: int2,head=int4. Values are rounded to nearest. A tied
    embedding has the head's format.
    """
    from vivace.llm import weight_formats
    from vivace.models.loading import load_model
    from vivace.models.packing import packed_names, write_model
    from vivace.plan import resolve

    loaded = load_model(model)
    formats = weight_formats(loaded.graph, resolve(_plan(format, group)))
    folder = Path(out).expanduser()
    names = packed_names(loaded.graph)
    num_weights = sum(math.prod(ref.shape) for ref in names)
    progress = _Progress(len(names))
    try:
        write_model(loaded, formats, folder, progress.count)
    finally:
        progress.clear()
    num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    bits = 8 * progress.num_bytes / num_weights
    if settings["json"]:
        print_json(
            {"path": str(folder), "num_bytes": num_bytes, "bits_per_weight": bits}
            | {"weight_bytes": progress.num_bytes, "num_weights": num_weights}
        )
    else:
        row = (str(folder), format_bytes(num_bytes), f"{bits:.3f}")
        print_table(("directory", "size", "bits per weight"), [row])


def _plan(format: str, group: str | None) -> Plan:
    from vivace.plan import Plan

    plan = Plan.of(weight_formats=format)
    if group is None:
        return plan
    size = int(group) if group.isdecimal() else group
    choices = []
    for name, options in plan.choices["weight_formats"]:
        if "role" not in options:
            if "group_size" in options:
                raise InvalidOption(
                    "--group and group_size of --format say the same: give one of them"
                )
            options = {**options, "group_size": size}
        choices.append((name, options))
    return Plan({"weight_formats": tuple(choices)})


class _Progress:
    """Counts matrices, on stderr where somebody is watching."""

    def __init__(self, num_matrices: int) -> None:
        self._num_matrices, self._done = num_matrices, 0
        self.num_bytes = 0

    def count(self, name: str, packed: Packed) -> None:
        self._done += 1
        self.num_bytes += packed.num_bytes
        if sys.stderr.isatty():
            line = f"{self._done} of {self._num_matrices} matrices, {format_bytes(self.num_bytes)}"
            print(f"\r{line:<60}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if sys.stderr.isatty():
            print(f"\r{'':<60}\r", end="", file=sys.stderr, flush=True)


quantize = command(
    "quantize",
    _quantize,
    "json",
    parameters=(
        click.Argument(["model"]),
        click.Option(
            ["--format"],
            metavar="NAME[:OPTION=VALUE,...][,ROLE=NAME...]",
            default="int4",
            show_default=True,
        ),
        click.Option(["--group"], metavar="N|row", help="weights of the body that share a scale"),
        click.Option(["--out", "-o"], metavar="DIR", required=True, help="new, or empty"),
    ),
)
