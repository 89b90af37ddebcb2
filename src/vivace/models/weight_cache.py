"""Packed weights of a checkpoint, kept for the next start in a file that is mapped then.

An entry is named after the model's path and the formats. It says which files it was made from; one
that does not fit them, or is damaged, is made again. Writers replace entries whole, so processes
may share a folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace.blocks import ModelGraph, WeightRef, weight_refs
from vivace.errors import BadFile, InvalidOption
from vivace.models.formats.packed_file import PackedFile, write_packed
from vivace.models.formats.unfinished import remove_leftovers
from vivace.models.matrices import matrix_of, pack_matrix, packed_bytes
from vivace.models.packing import packed_graph, packed_names
from vivace.models.quantized.matrices import QuantizedMatrix
from vivace.techniques.weight_formats.base import Packed, WeightFormat

if TYPE_CHECKING:
    from vivace.models.loading import LoadedModel

__all__ = ["MIN_BYTES", "OFF", "cache_folder", "packed_weights"]

OFF = "off"  # in the place of a folder
MIN_BYTES = 64 * 2**20  # smaller models are packed in no time
_PACKED_BITS = 16  # formats of fewer bits take time to pack
_log = logging.getLogger("vivace")


def cache_folder(chosen: str | Path | None) -> Path | None:
    """Where entries lie: the folder chosen, or the user's; None: nothing is kept.

    Raises `InvalidOption`.
    """
    if chosen == "":
        raise InvalidOption(f"the folder of packed weights is '': expected a path, or {OFF}")
    if chosen is not None:
        return None if chosen == OFF else Path(chosen).expanduser()
    variable = {"darwin": None, "win32": "LOCALAPPDATA"}.get(sys.platform, "XDG_CACHE_HOME")
    root = os.environ.get(variable) if variable else None
    if root and os.path.isabs(root):  # others do not count
        return Path(root) / "vivace" / "packed"
    try:
        home = Path.home()
    except RuntimeError:  # a user without one
        return None
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "vivace" / "packed"


def packed_weights(
    model: LoadedModel, formats: Mapping[WeightRef, WeightFormat], folder: Path | None
) -> tuple[ModelGraph, Mapping[str, Any]]:
    """The graph and weights to bind: the model's own, or with what takes time to pack packed.

    Without a folder, and where little is packed, they are the model's. An entry that cannot be read
    or written is no error: one line says so.

    Raises `InvalidOption` if a format cannot store a matrix, `BadFile` if one is not finite.
    """
    matrices = {ref: matrix_of(model.weights, ref) for ref in formats}
    wanted = {
        ref: weight_format
        for ref, weight_format in formats.items()
        if _takes_time(matrices[ref], weight_format)
    }
    if folder is None or not wanted or packed_bytes(model.weights, wanted) < MIN_BYTES:
        return model.graph, model.weights
    names = packed_names(model.graph)
    packed = _Entry(model, wanted, folder).read_or_make()
    weights: dict[str, Any] = {
        ref.name: model.weights[ref.name] for ref in weight_refs(model.graph) if ref not in formats
    }
    weights |= {names[ref]: matrix for ref, matrix in matrices.items() if ref not in wanted}
    return packed_graph(model.graph), weights | packed


def _takes_time(matrix: Any, weight_format: WeightFormat) -> bool:
    """Whether packing is more than mapping or copying."""
    if isinstance(matrix, Packed):
        return False
    return weight_format.grid.bits < _PACKED_BITS or isinstance(matrix, QuantizedMatrix)


class _Entry:
    def __init__(
        self, model: LoadedModel, formats: Mapping[WeightRef, WeightFormat], folder: Path
    ) -> None:
        self._model, self._formats = model, formats
        names = packed_names(model.graph)
        self._names = {ref: names[ref] for ref in formats}
        self._folder = folder
        stated = json.dumps([os.path.realpath(model.path), self._stated_formats()], default=str)
        digest = hashlib.sha256(stated.encode()).hexdigest()[:16]
        self._path = folder / f"{model.path.name[:64]}-{digest}.safetensors"

    def _stated_formats(self) -> list[Any]:
        made = [(name, self._formats[ref]) for ref, name in self._names.items()]
        return [(name, item.name, sorted(item.options().items())) for name, item in made]

    def read_or_make(self) -> dict[str, Packed]:
        found = self._read()
        if found is not None:
            return found
        makers = {name: partial(self._pack, ref) for ref, name in self._names.items()}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self._folder)
            write_packed(self._path, makers, dtype=self._model.dtype, source=self._source())
            return PackedFile(self._path).matrices()
        except OSError as error:
            _log.warning(
                "%s: packed weights are not kept for the next start (%s)",
                self._folder,
                error.strerror,
            )
        return {name: make() for name, make in makers.items()}

    def _pack(self, ref: WeightRef) -> Packed:
        packed = pack_matrix(ref.name, matrix_of(self._model.weights, ref), self._formats[ref])
        self._model.weights.release()
        return packed

    def _read(self) -> dict[str, Packed] | None:
        """What is kept, None where that is nothing that can be used."""
        if not os.path.exists(self._path):  # False where the folder cannot be read
            return None
        try:
            file = PackedFile(self._path)
            if file.source != self._source():
                _log.warning("%s: the model has changed since: packing it again", self._path)
                return None
            file.check()
        except BadFile as error:
            _log.warning("%s: cannot be used any more: packing the model again", self._path)
            _log.info("%s", error)
            return None
        found = file.matrices()
        shapes = {name: ref.shape for ref, name in self._names.items()}
        if {name: matrix.shape for name, matrix in found.items()} == shapes:
            return found
        _log.warning("%s: holds other matrices than the model: packing it again", self._path)
        return None

    def _source(self) -> str:
        """What an entry is made from: the files, and what the config says of how to read them."""
        method = self._model.config.values.get("quantization_config")
        return json.dumps([self._model.weights.identities, method], default=str)
