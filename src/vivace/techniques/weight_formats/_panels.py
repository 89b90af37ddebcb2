"""Panels of 16 outputs: how native kernels read integer codes (native/src/format.h)."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["LINE", "PANEL_OUTPUTS", "STEP_INPUTS", "pack_panels", "unpack_panels"]

PANEL_OUTPUTS = 16
STEP_INPUTS = 32  # inputs whose codes lie together
LINE = 64


def pack_panels(
    codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, bits: int
) -> np.ndarray:
    """Lay out codes [N, K] uint8, scales [N, G] and zeros [N, G] uint8 as bytes [panels, ...].

    Outputs that fill up the last panel have codes and scales of zero.
    """
    num_panels, steps = -(-len(codes) // PANEL_OUTPUTS), -(-codes.shape[1] // STEP_INPUTS)
    padded = np.zeros((num_panels * PANEL_OUTPUTS, steps * STEP_INPUTS), np.uint8)
    padded[: len(codes), : codes.shape[1]] = codes
    vectors = padded.reshape(num_panels, PANEL_OUTPUTS, steps, 8, 4)
    vectors = vectors.transpose(0, 2, 3, 1, 4).reshape(num_panels, steps, 8, LINE)
    parts = [_lanes(scales, num_panels).view(np.uint8).reshape(num_panels, -1)]
    if zeros is not None:
        parts.append(_lanes(zeros, num_panels).reshape(num_panels, -1))
    header = np.concatenate(parts, axis=1)
    header = np.pad(header, ((0, 0), (0, -header.shape[1] % LINE)))
    return np.concatenate([header, _squeeze(vectors, bits).reshape(num_panels, -1)], axis=1)


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
    num_panels, steps = -(-num_rows // PANEL_OUTPUTS), -(-num_columns // STEP_INPUTS)
    raw = raw.reshape(num_panels, -1)
    num_values = num_groups * PANEL_OUTPUTS
    scale_bytes = num_values * np.dtype(scale_type).itemsize
    scales = np.ascontiguousarray(raw[:, :scale_bytes]).view(scale_type)
    zeros = raw[:, scale_bytes : scale_bytes + num_values] if has_zeros else None
    vectors = _stretch(raw[:, raw.shape[1] - steps * bits * LINE :], steps, bits)
    vectors = vectors.reshape(num_panels, steps, 8, PANEL_OUTPUTS, 4)
    codes = vectors.transpose(0, 3, 1, 2, 4).reshape(num_panels * PANEL_OUTPUTS, -1)
    return (
        codes[:num_rows, :num_columns],
        _rows(scales, num_groups)[:num_rows],
        None if zeros is None else _rows(zeros, num_groups)[:num_rows],
    )


def _lanes(values: np.ndarray, num_panels: int) -> np.ndarray:
    """[N, G] -> [panels, G, 16], filled up with zeros."""
    padded = np.zeros((num_panels * PANEL_OUTPUTS, values.shape[1]), values.dtype)
    padded[: len(values)] = values
    lanes = padded.reshape(num_panels, PANEL_OUTPUTS, values.shape[1]).transpose(0, 2, 1)
    return np.ascontiguousarray(lanes)


def _rows(lanes: np.ndarray, num_groups: int) -> np.ndarray:
    by_group = lanes.reshape(len(lanes), num_groups, PANEL_OUTPUTS)
    return by_group.transpose(0, 2, 1).reshape(-1, num_groups)


def _squeeze(vectors: np.ndarray, bits: int) -> np.ndarray:
    """Eight vectors of codes -> `bits` vectors of whole bytes: [..., 8, 64] -> [..., bits, 64]."""
    if bits == 8:
        return vectors
    if bits == 4:
        return vectors[:, :, :4] | vectors[:, :, 4:] << 4
    pairs = vectors & 3
    low = pairs[:, :, 0:2] | pairs[:, :, 2:4] << 2 | pairs[:, :, 4:6] << 4 | pairs[:, :, 6:8] << 6
    if bits == 2:
        return low
    place = np.arange(8, dtype=np.uint8)[:, None]
    high = np.bitwise_or.reduce((vectors >> 2) << place, axis=2, keepdims=True)
    return np.concatenate([low, high], axis=2)


def _stretch(raw: np.ndarray, steps: int, bits: int) -> np.ndarray:
    """The inverse of `_squeeze`: [panels, ...] -> [panels, steps, 8, 64]."""
    packed = raw.reshape(len(raw), steps, bits, LINE)
    if bits == 8:
        return packed
    if bits == 4:
        return np.concatenate([packed & 15, packed >> 4], axis=2)
    low = np.concatenate([(packed[:, :, :2] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=2)
    if bits == 2:
        return low
    place = np.arange(8, dtype=np.uint8)[:, None]
    return low | ((packed[:, :, 2:] >> place) & 1) << 2
