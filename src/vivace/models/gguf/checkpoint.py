"""A GGUF file as a checkpoint: the family's graph over its tensors, its config and its sampling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vivace.blocks import ModelGraph
from vivace.models import graph_from_config
from vivace.models.config import Config
from vivace.models.formats.block_tensor import BlockTensor
from vivace.models.formats.gguf import GgufFile
from vivace.models.formats.safetensors import TensorInfo
from vivace.models.gguf.architectures import (
    ARCHITECTURES,
    architecture_of,
    config_from_metadata,
)
from vivace.models.gguf.names import stored_as_gguf

__all__ = ["GgufTensors", "generation_config", "read_graph", "sampling_keys"]

_ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
# A file's recommended sampling, by the names that generation configs have.
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


class GgufTensors:
    """The tensors of a file as matrices and vectors; blocks are decoded when they are read.

    `tensors` gives each one's type once decoded, its shape, and its bytes in the file.
    """

    def __init__(self, file: GgufFile) -> None:
        self._file, self.path, self.identities = file, file.path, file.identities
        self.tensors = {name: self._info(name) for name in file.tensors}

    def _info(self, name: str) -> TensorInfo:
        info = self._file.tensors[name]
        dtype = np.dtype(np.float16) if info.type.dtype is None else info.type.dtype
        *rows, columns = info.shape or (1,)
        shape = info.shape if len(info.shape) < 3 else (int(np.prod(rows)), columns)
        shape = (1, *shape) if _is_gate(name) and len(shape) == 1 else shape
        is_quantized = info.type.dtype is None
        return TensorInfo(dtype, shape, info.offset, info.num_bytes, is_quantized)

    def release(self) -> None:
        self._file.release()

    def array(self, name: str) -> np.ndarray | BlockTensor:
        array = self._file.array(name)
        if isinstance(array, np.ndarray) and array.ndim == 1 and _is_gate(name):
            return array[None]
        return array


def _is_gate(name: str) -> bool:
    """A matrix of one row that files store as a vector."""
    return name.endswith(".ffn_gate_inp_shexp.weight")


def read_graph(file: GgufFile) -> tuple[ModelGraph, Config]:
    """The graph over the file's own tensor names, and the config that it follows from.

    Raises `BadFile`, `UnsupportedModel`.
    """
    source = str(file.path)
    name = architecture_of(file.metadata, source)
    factors = _rope_factors(file)
    config = config_from_metadata(file.metadata, file.tensors, factors, source)
    graph = stored_as_gguf(graph_from_config(config), ARCHITECTURES[name], file.tensors)
    return graph, config


def _rope_factors(file: GgufFile) -> dict[str, np.ndarray]:
    found = [name for name in _ROPE_FACTORS if name in file.tensors]
    return {name: np.asarray(file.array(name), np.float32).reshape(-1) for name in found}


def generation_config(metadata: Mapping[str, Any], source: str) -> Config:
    """What the file recommends for sampling, as a generation config. Raises `BadFile`."""
    config, values = Config(metadata, f"{source}: metadata"), {}
    for key, field in _SAMPLING.items():
        name = f"general.sampling.{key}"
        given = config.values.get(name)
        if given is None:
            continue
        if isinstance(given, bool) or not isinstance(given, int | float):
            raise config.bad(name, "a number")
        values[field] = given
    return Config(values, f"{source}: general.sampling")


def sampling_keys(config: Config) -> dict[str, Any]:
    """What a generation config recommends, as far as files have keys for it."""
    if config.boolean("do_sample", True) is False:
        return {"general.sampling.temp": 0.0}
    found: dict[str, Any] = {}
    for key, field in _SAMPLING.items():
        if key == "top_k":
            value = config.integer(field, None, low=0)
        else:
            value = config.number(field, None, low=-1.0)
        if value is not None:
            found[f"general.sampling.{key}"] = value
    return found
