"""AWQ checkpoints as AutoAWQ writes them ("gemm"): 4-bit codes packed along the outputs."""

from __future__ import annotations

import numpy as np

from vivace.errors import BadFile, UnsupportedModel
from vivace.models.config import Config
from vivace.models.formats.safetensors import TensorInfo
from vivace.models.quantized.gptq import group_size
from vivace.models.quantized.matrices import CodedMatrix, unpack_codes
from vivace.models.quantized.parts import FLOATS, Parts

__all__ = ["Awq"]

_BITS = 4
_NIBBLE_OF_COLUMN = [0, 4, 1, 5, 2, 6, 3, 7]  # of the eight columns that a word holds


class Awq:
    """w[n, k] = (code[n, k] - zero[n, g]) * scale[n, g], where g = k // group_size.

    Of a matrix [N, K] with G groups: `qweight` [K, N / 8] int32, `qzeros` [G, N / 8] int32, whose
    words hold eight outputs each in an order of their own, and `scales` [G, N].

    Raises:
        BadFile: a field of the config has a wrong value.
        UnsupportedModel: another layout of AWQ.
    """

    names = frozenset({"qweight", "qzeros", "scales"})
    unused: frozenset[str] = frozenset()

    def __init__(self, config: Config) -> None:
        if config.integer("bits") != _BITS:
            raise config.bad("bits", "4")
        self.group_size = group_size(config)
        config.boolean("zero_point", True)  # stored all the same
        for field in ("version", "format", "checkpoint_format"):
            _check_layout(config, field, config.text(field, "gemm"))
        _check_layout(config, "backend", config.text("backend", "gemm"), ("llm-awq",))

    def is_quantized(self, parts: dict[str, TensorInfo]) -> bool:
        return not self.names.isdisjoint(parts)

    def matrix(self, parts: Parts) -> CodedMatrix:
        """Raises `BadFile`."""
        num_rows, num_columns = parts.shape
        group = min(self.group_size or num_columns, num_columns)
        if num_rows % 8 or num_columns % group:
            raise BadFile(
                f"matrix '{parts.module}' [{num_rows}, {num_columns}] cannot be AWQ's: expected a "
                f"multiple of 8 outputs and of {group} inputs; config and weights are not of one "
                "model"
            )
        num_groups = num_columns // group
        words = parts.read("qweight", ("int32",), (num_columns, num_rows // 8))
        zeros = _unpack(parts.read("qzeros", ("int32",), (num_groups, num_rows // 8)))
        scales = parts.read("scales", FLOATS, (num_groups, num_rows)).T

        def read(first: int, last: int) -> np.ndarray:
            start = first // 8
            return _unpack(words[:, start : -(-last // 8)])[first - 8 * start : last - 8 * start]

        return CodedMatrix(parts.shape, _BITS, group, scales, zeros, parts.num_bytes, read)


def _unpack(words: np.ndarray) -> np.ndarray:
    """Words [R, W] -> their codes, outputs first: [8 W, R] uint8."""
    nibbles = unpack_codes(words, _BITS, 8 * words.shape[1]).reshape(*words.shape, 8)
    return nibbles[:, :, _NIBBLE_OF_COLUMN].reshape(len(words), -1).T


def _check_layout(config: Config, field: str, name: str, refused: tuple[str, ...] = ()) -> None:
    if name.lower() in refused or (not refused and name.lower() != "gemm"):
        raise UnsupportedModel(
            f"{config.source}: {field} '{name}' is not supported: expected AWQ's version gemm; use "
            "a checkpoint in it, or the unquantized one"
        )
