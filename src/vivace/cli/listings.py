"""`vivace ls`, `vivace techniques`, `vivace version`: what there is."""

from __future__ import annotations

import dataclasses
from typing import Any

from vivace.cli.options import command
from vivace.cli.output import format_bytes, print_json, print_table
from vivace.config import Settings

__all__ = ["list_techniques", "ls", "techniques", "version"]


def _ls(settings: Settings) -> None:
    """List the models that can run without a download."""
    from vivace.models.location import list_local

    models = list_local()
    if settings["json"]:
        print_json([dataclasses.asdict(model) | {"path": str(model.path)} for model in models])
        return
    rows = [(m.name, m.origin, format_bytes(m.num_bytes), str(m.path)) for m in models]
    print_table(("name", "origin", "size", "path"), rows)


def _techniques(settings: Settings) -> None:
    """List what a plan can choose from."""
    listed = list_techniques()
    if settings["json"]:
        print_json(listed)
        return
    rows = [
        (t["seam"], t["name"], t["exactness"], " ".join(t["papers"]), t["summary"]) for t in listed
    ]
    print_table(("seam", "technique", "exactness", "papers", "summary"), rows)


def list_techniques() -> list[dict[str, Any]]:
    """Every technique as plain data, with its default options; imports all of them."""
    from vivace.registry import seams

    listed = []
    for seam in seams().values():
        for name in seam.names():
            info = seam.info(name)
            technique = seam.create(name)
            listed.append(
                {
                    "seam": seam.name,
                    "name": name,
                    "summary": info.summary,
                    "papers": list(info.papers),
                    "maturity": str(info.maturity),
                    "exactness": str(technique.exactness),
                    "options": technique.options(),
                }
            )
    return listed


def _version(settings: Settings) -> None:
    """Print the version."""
    from vivace import __version__

    if settings["json"]:
        print_json({"version": __version__})
    else:
        print(__version__)


ls = command("ls", _ls, "json")
techniques = command("techniques", _techniques, "json")
version = command("version", _version, "json")
