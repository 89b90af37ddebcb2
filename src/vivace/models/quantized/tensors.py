"""The tensors of a quantized checkpoint under the names that a model asks for."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from vivace.blocks import ModelGraph, WeightRef, matrix_roles, weight_refs
from vivace.errors import UnsupportedModel
from vivace.models.config import Config, show
from vivace.models.formats.mapped_file import Identity
from vivace.models.formats.safetensors import TensorInfo
from vivace.models.quantized.awq import Awq
from vivace.models.quantized.compressed_tensors import CompressedTensors
from vivace.models.quantized.gptq import Gptq
from vivace.models.quantized.matrices import QuantizedMatrix
from vivace.models.quantized.parts import Parts, Source

__all__ = ["METHODS", "QuantizationMethod", "QuantizedTensors", "read_method"]

_log = logging.getLogger(__name__)


class QuantizationMethod(Protocol):
    """How a checkpoint stores a matrix in several tensors.

    `names` are the last parts of their names; those of `unused` change nothing that is computed
    here.
    """

    @property
    def names(self) -> frozenset[str]: ...
    @property
    def unused(self) -> frozenset[str]: ...

    def is_quantized(self, parts: dict[str, TensorInfo]) -> bool:
        """Whether the tensors of a module, by the last part of their names, are its."""
        ...

    def matrix(self, parts: Parts) -> QuantizedMatrix:
        """The matrix that tensors make up. Raises `BadFile`, `UnsupportedModel`."""
        ...


METHODS = {"gptq": Gptq, "awq": Awq, "compressed-tensors": CompressedTensors}


def read_method(config: Config) -> QuantizationMethod:
    """What a config's `quantization_config` says. Raises `BadFile`, `UnsupportedModel`."""
    section = config.required_section("quantization_config")
    name = section.text("quant_method")
    if name not in METHODS:
        raise UnsupportedModel(
            f"{section.source}: quant_method '{name[:40]}' is not supported: expected "
            f"{', '.join(METHODS)}; use the unquantized checkpoint, or a GGUF file"
        )
    return METHODS[name](section)


class QuantizedTensors:
    """What `Weights` reads: a matrix for the tensors that it is stored as, all others as they are.

    Args:
        source: the tensors of the files.
        method: how matrices are stored.
        graph: the matrices that the model asks for.
        path: the checkpoint.
    Raises:
        BadFile: a tensor is missing, or of a wrong type, shape or value.
        UnsupportedModel: a matrix is stored in another way.
    """

    def __init__(
        self, source: Source, method: QuantizationMethod, graph: ModelGraph, path: Path
    ) -> None:
        self.path = path
        self._source, self._matrices = source, dict[str, QuantizedMatrix]()
        self.tensors = {name: source.info(name) for name in source}
        modules = defaultdict[str, dict[str, TensorInfo]](dict)
        for name in source:
            module, _, part = name.rpartition(".")
            modules[module][part] = source.info(name)
        for ref, shape in _matrix_shapes(graph).items():
            module = ref.name.removesuffix(".weight")
            parts = modules.get(module, {})
            if method.is_quantized(parts):
                self._add(method, ref, Parts(source, module, frozenset(parts), shape))
            elif parts and "weight" not in parts:
                raise UnsupportedModel(
                    f"{path}: matrix {show(ref.name)} is stored as {', '.join(sorted(parts))[:80]}:"
                    f" expected weight, or {', '.join(sorted(method.names))}; use a checkpoint "
                    "quantized in one way, or the unquantized one"
                )
        self._drop_unused(method, {ref.name for ref in weight_refs(graph)})

    @property
    def identities(self) -> Sequence[Identity]:
        return self._source.identities

    def release(self) -> None:
        self._source.release()

    def array(self, name: str) -> np.ndarray | QuantizedMatrix:
        return self._matrices[name] if name in self._matrices else self._source[name]

    def _add(self, method: QuantizationMethod, ref: WeightRef, parts: Parts) -> None:
        if ref.is_transposed:
            raise UnsupportedModel(
                f"{self.path}: matrix {show(ref.name)} is quantized and stored as (in, out), which "
                "is not supported: use the unquantized checkpoint, or a GGUF file"
            )
        matrix = self._matrices[ref.name] = method.matrix(parts)
        for name in sorted(parts.unread & (method.names | {"weight"})):
            raise parts.bad(name, "is there", "none beside what the matrix is stored as")
        for name in parts.names & method.names:
            del self.tensors[f"{parts.module}.{name}"]
        dtype = np.dtype(np.float16)
        self.tensors[ref.name] = TensorInfo(dtype, parts.shape, 0, matrix.num_bytes, True)

    def _drop_unused(self, method: QuantizationMethod, wanted: set[str]) -> None:
        """Leave out what changes nothing: biases of zero that GPTQ writes, scales of inputs."""
        scales = [n for n in self.tensors if n.rpartition(".")[2] in method.unused]
        if scales:
            _log.warning(
                "%s: not used: %d tensors such as %s", self.path, len(scales), show(scales[0])
            )
        biases = [f"{name.removesuffix('.weight')}.bias" for name in self._matrices]
        extra = [n for n in biases if n in self.tensors and n not in wanted]
        for name in [*scales, *(n for n in extra if not np.any(self._source[n]))]:
            del self.tensors[name]


def _matrix_shapes(graph: ModelGraph) -> dict[WeightRef, tuple[int, int]]:
    """One ref for each matrix, and the shape to the last row that is used."""
    refs: dict[str, WeightRef] = {}
    ends: dict[str, int] = {}
    for ref in matrix_roles(graph):
        refs.setdefault(ref.name, ref)
        ends[ref.name] = max(ends.get(ref.name, 0), ref.first_row + ref.shape[0])
    return {ref: (ends[name], ref.shape[1]) for name, ref in refs.items()}
