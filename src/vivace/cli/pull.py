"""`vivace pull`: fetch a model from the hub into the hub's own cache."""

from __future__ import annotations

import sys

import click

from vivace.cli.options import command
from vivace.cli.output import print_json
from vivace.config import Settings

__all__ = ["pull"]


def _pull(settings: Settings, model: str) -> None:
    """Download a model, or what is new of it.

    It goes to the cache of the hub; HF_HOME, HF_TOKEN and HF_HUB_OFFLINE have their usual meaning.
    """
    from huggingface_hub.utils import disable_progress_bars

    from vivace.models import location

    if not sys.stderr.isatty():
        disable_progress_bars()
    name, _, revision = model.partition("@")
    path = location.pull(name, revision or None)
    if settings["json"]:
        print_json({"name": name, "revision": revision or None, "path": str(path)})
    else:
        print(path)


pull = command(
    "pull", _pull, "json", parameters=(click.Argument(["model"], metavar="ORG/NAME[@REVISION]"),)
)
