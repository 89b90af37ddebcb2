"""`vivace export`: a model as one GGUF file, for other programs that read this format."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from vivace.cli.options import command
from vivace.cli.output import format_bytes, note, print_json, print_table
from vivace.config import Settings
from vivace.errors import InvalidOption

__all__ = ["export"]

_TYPES = ("f32", "f16", "bf16", "q8_0")


def _export(
    settings: Settings, model: str, file: str, type: str | None, pre: str | None, force: bool
) -> None:
    """Write MODEL and its tokenizer as the GGUF file OUT.

    MODEL is a directory, a GGUF file, org/name on the hub, or a shipped name. Of a GGUF file the
    metadata and, without --type, the weights are copied as they are; parts of a split become one
    file. A model or tokenizer that GGUF cannot describe is refused.
    """
    from vivace.models.formats.gguf import GgufFile
    from vivace.models.gguf.export import check_name, export_gguf
    from vivace.models.gguf.tokenizer import WHOLE_TOKENIZER
    from vivace.models.gguf.write import Storage
    from vivace.models.loading import load_model

    path = Path(file).expanduser()
    check_name(path)
    if path.exists() and not force:
        raise InvalidOption(f"{path} exists: --force replaces it")
    export_gguf(load_model(model), path, None if type is None else Storage(type), pre)
    written = GgufFile(path)
    types = Counter(info.type.name for info in written.tensors.values())
    num_bytes = path.stat().st_size
    if settings["json"]:
        print_json({"path": str(path), "num_bytes": num_bytes, "types": dict(types)})
    else:
        rows = [(str(path), format_bytes(num_bytes), _spell(types))]
        print_table(("file", "size", "tensors"), rows)
    if pre is not None and WHOLE_TOKENIZER in written.metadata:
        note(f"other programs cut some texts as {pre} does, and not as the model was trained")


def _spell(types: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in types.most_common())


export = command(
    "export",
    _export,
    "json",
    parameters=(
        click.Argument(["model"]),
        click.Argument(["file"], metavar="OUT.gguf"),
        click.Option(
            ["--type"],
            type=click.Choice(_TYPES),
            help="how matrices are stored; unset: as they are",
        ),
        click.Option(
            ["--pre"],
            metavar="NAME",
            help="name for how a byte-level tokenizer cuts texts; unset: told by its patterns",
        ),
        click.Option(["--force"], is_flag=True, help="replace a file that is there"),
    ),
)
