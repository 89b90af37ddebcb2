"""GPTQ checkpoints as AutoGPTQ and GPTQModel write them: codes packed along the inputs."""

from __future__ import annotations

import logging

import numpy as np

from vivace.errors import UnsupportedModel
from vivace.models.config import Config
from vivace.models.formats.safetensors import TensorInfo
from vivace.models.quantized.matrices import CodedMatrix, unpack_codes
from vivace.models.quantized.parts import FLOATS, Parts

__all__ = ["Gptq"]

_log = logging.getLogger(__name__)
_BITS = (2, 3, 4, 8)
_FORMATS = ("gptq", "gptq_v2")


class Gptq:
    """w[n, k] = (code[n, k] - zero[n, g]) * scale[n, g], where column k is of group g = g_idx[k].

    Of a matrix [N, K] with G groups: `qweight` [K bits / 32, N] int32, each column one stream of
    bits; `qzeros` [G, N bits / 32] int32, each row one; `scales` [G, N]; `g_idx` [K] int32, which
    old files leave out where groups lie in order. A zero is stored minus one, modulo 2^bits, unless
    the format is `gptq_v2`; files that call themselves symmetric and hold the middle code are of
    that kind whatever they say.

    Raises:
        BadFile: a field of the config has a wrong value.
        UnsupportedModel: another layout of GPTQ.
    """

    names = frozenset({"qweight", "qzeros", "scales", "g_idx"})
    unused: frozenset[str] = frozenset()

    def __init__(self, config: Config) -> None:
        self.bits = config.integer("bits")
        if self.bits not in _BITS:
            raise config.bad("bits", "2, 3, 4 or 8")
        self.group_size = group_size(config)
        self.is_symmetric = config.boolean("sym", True)
        self.is_reordered = config.boolean("desc_act")
        self.zeros_minus = 0 if _format(config) == "gptq_v2" else 1
        _refuse_variants(config)
        self._has_told = False

    def is_quantized(self, parts: dict[str, TensorInfo]) -> bool:
        return not self.names.isdisjoint(parts)

    def matrix(self, parts: Parts) -> CodedMatrix:
        """Raises `BadFile`."""
        (num_rows, num_columns), bits = parts.shape, self.bits
        group = min(self.group_size or num_columns, num_columns)
        num_groups = -(-num_columns // group)
        words = parts.read("qweight", ("int32",), (-(-num_columns * bits // 32), num_rows))
        packed = parts.read("qzeros", ("int32",), (num_groups, -(-num_rows * bits // 32)))
        scales = parts.read("scales", FLOATS, (num_groups, num_rows)).T
        zeros = self._zeros(unpack_codes(packed, bits, num_rows)).T
        group_of = self._group_of(parts, num_groups, group)

        def read(first: int, last: int) -> np.ndarray:
            return unpack_codes(words[:, first:last].T, bits, num_columns)

        return CodedMatrix(parts.shape, bits, group, scales, zeros, parts.num_bytes, read, group_of)

    def _zeros(self, fields: np.ndarray) -> np.ndarray:
        """Zeros of what `qzeros` holds."""
        middle, minus = 1 << self.bits - 1, self.zeros_minus
        if self.is_symmetric and fields.size and (fields == middle - 1 + minus).all():
            minus = 1 - minus
            if not self._has_told:
                self._has_told = True
                _log.warning(
                    "zero points of %d: the checkpoint is of the format %s, though it says %s",
                    fields.flat[0],
                    _FORMATS[1 - minus],
                    _FORMATS[minus],
                )
        return (fields + np.uint8(minus)) & np.uint8((1 << self.bits) - 1)

    def _group_of(self, parts: Parts, num_groups: int, group: int) -> np.ndarray | None:
        """The group of each column, or None where groups lie in order."""
        if not parts.has("g_idx") and not self.is_reordered:
            return None
        num_columns = parts.shape[1]
        group_of = parts.read("g_idx", ("int32",), (num_columns,))
        if num_columns and not 0 <= group_of.min() <= group_of.max() < num_groups:
            found = f"has groups {group_of.min()} to {group_of.max()}"
            raise parts.bad("g_idx", found, f"0 to {num_groups - 1}")
        is_in_order = (group_of == np.arange(num_columns) // group).all()
        return None if is_in_order else np.array(group_of)


def group_size(config: Config) -> int | None:
    """Weights that share a scale; None: those of a row, which files write as -1."""
    size = config.integer("group_size", low=-1)
    if size == 0:
        raise config.bad("group_size", "-1 or a whole number from 1")
    return None if size == -1 else size


def _format(config: Config) -> str:
    """Newer files say `format`, older ones `checkpoint_format`, the oldest nothing."""
    name = config.text("checkpoint_format", None) or config.text("format", "gptq")
    if name not in _FORMATS:
        raise UnsupportedModel(
            f"{config.source}: checkpoint_format '{name}' is not supported: expected gptq or "
            "gptq_v2; use a checkpoint in one of them, or the unquantized one"
        )
    return name


def _refuse_variants(config: Config) -> None:
    """Raises `UnsupportedModel` where tensors mean something else than they usually do."""
    changes = config.section("dynamic")
    overridden = [] if changes is None else [n for n in changes.values if not n.startswith("-:")]
    reason = None
    if config.boolean("is_marlin_format"):
        reason = "is_marlin_format: weights lie as one GPU's kernel wants them"
    elif config.text("pack_dtype", "int32") != "int32":
        reason = f"pack_dtype '{config.values['pack_dtype']}': only int32 is read"
    elif overridden:
        reason = f"dynamic: it gives '{overridden[0][:60]}' other settings"
    if reason is not None:
        raise UnsupportedModel(
            f"{config.source}: {reason}; use a GPTQ checkpoint without it, or the unquantized one"
        )
