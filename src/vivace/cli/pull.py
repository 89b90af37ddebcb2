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

    Of a repository with GGUF files, QUANT is the quantization to fetch, such as Q4_K_M, or the name
    of a file; without it they are fetched only where there are no safetensors.

    It goes to the cache of the hub; HF_HOME, HF_TOKEN and HF_HUB_OFFLINE have their usual meaning.
    """
    from huggingface_hub.utils import disable_progress_bars

    from vivace.models import hub

    if not sys.stderr.isatty():
        disable_progress_bars()
    name, revision, quantization = hub.split_hub_name(model)
    path = hub.pull(name, revision, quantization)
    if settings["json"]:
        named = {"name": name, "revision": revision, "quantization": quantization}
        print_json(named | {"path": str(path)})
    else:
        print(path)


pull = command(
    "pull",
    _pull,
    "json",
    parameters=(click.Argument(["model"], metavar="ORG/NAME[@REVISION][:QUANT]"),),
)
