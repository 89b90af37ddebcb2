"""Units of four panels of 16 outputs: how native kernels read integer codes.

The layout is that of `CodesLayout` in native/src/format.h.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["STEP_INPUTS", "UNIT_OUTPUTS", "pack_panels", "unpack_panels"]

STEP_INPUTS = 32  # inputs whose codes lie together
UNIT_OUTPUTS = 64
_PANELS, _LANES = 4, 16
_LINE = 64


def pack_panels(
    codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, bits: int
) -> np.ndarray:
    """Lay out codes [N, K] uint8, scales [N, G] and zeros [N, G] uint8 as bytes [units, ...].

    Outputs that fill up the last unit have codes and scales of zero.
    """
    num_units, steps = -(-len(codes) // UNIT_OUTPUTS), -(-codes.shape[1] // STEP_INPUTS)
    num_groups = scales.shape[1]
    padded = np.zeros((num_units * UNIT_OUTPUTS, steps * STEP_INPUTS), np.uint8)
    padded[: len(codes), : codes.shape[1]] = codes
    vectors = padded.reshape(num_units, _PANELS, _LANES, steps, 8, 4)
    vectors = vectors.transpose(0, 3, 1, 4, 2, 5).reshape(num_units, steps, _PANELS, 8, _LINE)
    parts = [_by_group(scales, num_units).view(np.uint8)]
    if zeros is not None:
        parts.append(_by_group(zeros, num_units))
    parts.append(_squeeze(vectors, bits).swapaxes(2, 3).reshape(num_units, num_groups, -1))
    return np.concatenate(parts, axis=2).reshape(num_units, -1)


def unpack_panels(
    raw: np.ndarray,
    shape: tuple[int, int],
    num_groups: int,
    scale_type: Any,
    has_zeros: bool,
    bits: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """What `pack_panels` laid out: codes [N, K], scales [N, G] and zeros [N, G] or None."""
    num_rows, num_columns = shape
    num_units, steps = -(-num_rows // UNIT_OUTPUTS), -(-num_columns // STEP_INPUTS)
    groups = raw.reshape(num_units, num_groups, -1)
    zeros_at = UNIT_OUTPUTS * np.dtype(scale_type).itemsize
    codes_at = zeros_at + has_zeros * UNIT_OUTPUTS
    scales = np.ascontiguousarray(groups[..., :zeros_at]).view(scale_type)
    zeros = groups[..., zeros_at:codes_at] if has_zeros else None
    vectors = groups[..., codes_at:].reshape(num_units, steps, bits, _PANELS, _LINE)
    vectors = _stretch(vectors.swapaxes(2, 3), bits).reshape(
        num_units, steps, _PANELS, 8, _LANES, 4
    )
    codes = vectors.transpose(0, 2, 4, 1, 3, 5).reshape(num_units * UNIT_OUTPUTS, -1)
    return (
        codes[:num_rows, :num_columns],
        _by_row(scales)[:num_rows],
        None if zeros is None else _by_row(zeros)[:num_rows],
    )


def _by_group(values: np.ndarray, num_units: int) -> np.ndarray:
    """[N, G] -> [units, G, 64], filled up with zeros."""
    padded = np.zeros((num_units * UNIT_OUTPUTS, values.shape[1]), values.dtype)
    padded[: len(values)] = values
    by_unit = padded.reshape(num_units, UNIT_OUTPUTS, values.shape[1])
    return np.ascontiguousarray(by_unit.transpose(0, 2, 1))


def _by_row(values: np.ndarray) -> np.ndarray:
    """[units, G, 64] -> [N, G]"""
    return values.transpose(0, 2, 1).reshape(-1, values.shape[1])


def _squeeze(vectors: np.ndarray, bits: int) -> np.ndarray:
    """Eight vectors of codes -> `bits` vectors of whole bytes: [..., 8, 64] -> [..., bits, 64]."""
    if bits == 8:
        return vectors
    if bits == 4:
        return vectors[..., :4, :] | vectors[..., 4:, :] << 4
    pairs = (vectors & 3).reshape(*vectors.shape[:-2], 4, 2, _LINE)
    place = np.arange(0, 8, 2, dtype=np.uint8)[:, None, None]
    low = np.bitwise_or.reduce(pairs << place, axis=-3)
    if bits == 2:
        return low
    place = np.arange(8, dtype=np.uint8)[:, None]
    high = np.bitwise_or.reduce((vectors >> 2) << place, axis=-2, keepdims=True)
    return np.concatenate([low, high], axis=-2)


def _stretch(packed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `_squeeze`."""
    if bits == 8:
        return packed
    if bits == 4:
        return np.concatenate([packed & 15, packed >> 4], axis=-2)
    low = np.concatenate([(packed[..., :2, :] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=-2)
    if bits == 2:
        return low
    place = np.arange(8, dtype=np.uint8)[:, None]
    return low | ((packed[..., 2:, :] >> place) & 1) << 2
