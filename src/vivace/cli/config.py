"""`vivace config`: what every setting is, and where that came from."""

from __future__ import annotations

import click

from vivace.cli.options import command
from vivace.cli.output import print_json, print_table
from vivace.config import Settings, config_files

__all__ = ["config"]


def _show(settings: Settings) -> None:
    """Print every setting: flag, environment, plan, config file, default, in that order."""
    if settings["json"]:
        print_json(
            {
                "settings": {
                    name: {"value": value, "origin": settings.origin(name)}
                    if settings["origin"]
                    else value
                    for name, value in settings.items()
                },
                "files": [str(path) for path in config_files()],
            }
        )
        return
    rows = [(name, _spell(value), settings.origin(name)) for name, value in settings.items()]
    if settings["origin"]:
        print_table(("setting", "value", "origin"), rows)
    else:
        print_table(("setting", "value"), [row[:2] for row in rows])


def _spell(value: object) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{token}:{bias:g}" for token, bias in value.items()) or "none"
    return str(value)


config = click.Group(
    "config", help="Show settings and where they come from.", no_args_is_help=False
)
config.add_command(command("show", _show, "origin", "json", "plan"))
