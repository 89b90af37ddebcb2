"""Options of commands, made from the table of settings."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import click

from vivace.config import SAMPLING, SETTINGS, Kind, Setting, resolve

__all__ = ["MODEL", "SAMPLING", "command"]

MODEL = (
    "plan",
    "weights",
    "weight_cache",
    "kv",
    "threads",
    "isa",
    "context",
    "tokenization",
)  # what loading a model takes
_ALWAYS = ("debug",)


def command(
    name: str,
    function: Callable[..., None],
    *names: str,
    parameters: tuple[click.Parameter, ...] = (),
) -> click.Command:
    """A command with the options of these settings, which it receives resolved, before the rest.

    Its help is the function's docstring; `parameters` come before the options.
    """
    names = (*names, *_ALWAYS)

    def call(**given: Any) -> None:
        flags = {name: given.pop(name) for name in names}
        chosen = {name: raw for name, raw in flags.items() if raw is not None and raw != ()}
        settings = resolve(chosen)
        try:
            function(settings, **given)
        except click.exceptions.Exit:
            raise
        except Exception:
            if settings["debug"]:
                traceback.print_exc()
            raise

    options = [_option(SETTINGS[name]) for name in names]
    params = [*parameters, *options]
    return click.Command(name, callback=call, params=params, help=function.__doc__)


def _option(setting: Setting) -> click.Option:
    """Values stay text here: one parser serves flags, variables and files alike."""
    shown = setting.help
    if setting.default not in (None, False, (), {}):
        shown += f" [{setting.default}]"
    if setting.kind is Kind.SWITCH:
        flags = f"{setting.flag}/--no-{setting.flag[2:]}"
        return click.Option([setting.name, flags], default=None, help=shown)
    return click.Option(
        [setting.name, setting.flag],
        metavar="|".join(setting.choices) or setting.kind.name,
        multiple=setting.kind.is_list,
        help=shown,
    )
