"""Models whose matrices are packed: one stored matrix for each that the graph names."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vivace.blocks import ModelGraph, WeightRef, matrix_roles, replace_refs, weight_refs
from vivace.errors import InvalidOption, UnsupportedModel
from vivace.models.formats.packed_file import write_packed
from vivace.models.formats.unfinished import whole_folder
from vivace.models.matrices import matrix_of, pack_matrix
from vivace.techniques.weight_formats.base import Packed, WeightFormat

if TYPE_CHECKING:
    from vivace.models.loading import LoadedModel

__all__ = ["is_packed", "packed_graph", "packed_names", "write_model"]

METHOD = "vivace"  # in a config's quantization_config
# What belongs to a model beside its config and weights.
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
)


def packed_names(graph: ModelGraph) -> dict[WeightRef, str]:
    """A name for every matrix: the tensor's, with a range of rows where it is a part of one."""
    refs = list(matrix_roles(graph))
    parts = Counter(ref.name for ref in refs)

    def name(ref: WeightRef) -> str:
        if parts[ref.name] == 1 and ref.first_row == 0:
            return ref.name
        return f"{ref.name}[{ref.first_row}:{ref.first_row + ref.shape[0]}]"

    return {ref: name(ref) for ref in refs}


def packed_graph(graph: ModelGraph) -> ModelGraph:
    """The graph that names its matrices as `packed_names` does, each one a whole tensor."""
    names = packed_names(graph)
    return replace_refs(
        graph, lambda ref: WeightRef(names[ref], ref.shape) if ref in names else ref
    )


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether a config is that of a model that `write_model` wrote."""
    section = config.get("quantization_config")
    return isinstance(section, Mapping) and section.get("quant_method") == METHOD


def write_model(
    model: LoadedModel,
    formats: Mapping[WeightRef, WeightFormat],
    folder: Path,
    on_matrix: Callable[[str, Packed], None] = lambda name, packed: None,
) -> None:
    """Write a directory with the model's matrices packed; it appears whole or not at all.

    Args:
        formats: of every matrix.
        folder: of the new model; not there, or empty.
        on_matrix: called with each matrix before it is written.
    Raises:
        InvalidOption: there is something of that name, or a format cannot store a matrix.
        UnsupportedModel: the model is a GGUF file.
        BadFile: the model's files are damaged.
        OSError: the directory cannot be written; nothing is left of it.
    """
    if model.path.is_file():
        raise UnsupportedModel(
            f"{model.path}: a GGUF file has no config.json and tokenizer.json to lie beside "
            "packed weights: run it with --weights, which packs it once and keeps that, or "
            "quantize the checkpoint that it was made from"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidOption(f"{folder} is there and not an empty directory: choose another name")
    model.check_files()
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as unfinished:
        _write_files(model, formats, unfinished, on_matrix)


def _write_files(
    model: LoadedModel,
    formats: Mapping[WeightRef, WeightFormat],
    folder: Path,
    on_matrix: Callable[[str, Packed], None],
) -> None:
    def make(ref: WeightRef, name: str) -> Packed:
        packed = pack_matrix(ref.name, matrix_of(model.weights, ref), formats[ref])
        on_matrix(name, packed)
        model.weights.release()
        return packed

    names = packed_names(model.graph)
    makers = {name: lambda r=ref, n=name: make(r, n) for ref, name in names.items()}
    others = {
        ref.name: np.asarray(model.weights[ref.name])
        for ref in weight_refs(model.graph)
        if ref not in names
    }
    write_packed(folder / "model.safetensors", makers, others, dtype=model.dtype)
    config = dict(model.config.values) | {"quantization_config": {"quant_method": METHOD}}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in _COPIED:
        source = model.path / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        elif source.exists():
            shutil.copyfile(source, folder / name)
