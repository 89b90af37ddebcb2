"""Weights as codes into a table of values, with a scale for each group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from vivace.errors import InvalidOption
from vivace.registry import TechniqueInfo
from vivace.techniques.weight_formats._tables import FLOAT_TYPES, STEP, TableKernel, flush
from vivace.techniques.weight_formats.base import Grid, Matrix, Packed, WeightFormat

INFO = TechniqueInfo(
    summary="codes looked up in a table: nf4, fp4, fp6, fp8, mxfp4, nvfp4 and values of your own",
    papers=("P327", "P334", "P337", "P311", "P046", "P258"),
)
_NF4 = (
    "-1,-0.6961928,-0.52507305,-0.3949175,-0.28444138,-0.18477343,-0.091050036,0,0.0795803,"
    "0.1609302,0.2461123,0.33791524,0.44070983,0.562617,0.72295684,1"
)
_IQ4_NL = "-127,-104,-83,-65,-49,-35,-22,-10,1,13,25,38,53,69,89,113"
_BNB_FP4 = (  # bitsandbytes' own: no E2M1
    "0,0.0052083335,0.6666667,1,0.33333334,0.5,0.16666667,0.25,"
    "-0,-0.0052083335,-0.6666667,-1,-0.33333334,-0.5,-0.16666667,-0.25"
)
# Values, weights that share a scale, its type, and whether those below zero have one of their own.
PRESETS = {
    "nf4": TableKernel(_NF4, 64, "float16"),
    "bnb_fp4": TableKernel(_BNB_FP4, 64, "float16"),
    "iq4_nl": TableKernel(_IQ4_NL, 32, "float16"),
    "fp4": TableKernel("e2m1", 32, "float16"),
    "fp6": TableKernel("e3m2", None, "float16"),
    "fp6_e2m3": TableKernel("e2m3", None, "float16"),
    "fp8": TableKernel("e4m3", None, "float32"),
    "fp8_e5m2": TableKernel("e5m2", None, "float32"),
    "mxfp4": TableKernel("e2m1", 32, "e8m0"),
    "mxfp6": TableKernel("e3m2", 32, "e8m0"),
    "mxfp8": TableKernel("e4m3", 32, "e8m0"),
    "nvfp4": TableKernel("e2m1", 16, "e4m3"),
    "llm_fp4": TableKernel("e2m1", None, "float32"),
    "afpq4": TableKernel("e2m1", 32, "float16", is_signed=True),
    "afpq3": TableKernel("0,1,2,4,-0,-1,-2,-4", 32, "float16", is_signed=True),
}
Preset = Literal[
    "nf4", "bnb_fp4", "iq4_nl", "fp4", "fp6", "fp6_e2m3", "fp8", "fp8_e5m2", "mxfp4", "mxfp6",
    "mxfp8", "nvfp4", "llm_fp4", "afpq4", "afpq3",
]  # fmt: skip
_PIECE_WEIGHTS = 2**20  # quantized at a time
_LARGEST_E4M3 = 448


@dataclass(frozen=True)
class Config:
    preset: Preset = "nf4"
    values: tuple[float, ...] = ()
    group_size: Literal["row", 16, 32, 64, 128] | None = None
    scale_type: Literal["float32", "float16", "bfloat16", "e8m0", "e4m3"] | None = None


class Table(WeightFormat):
    """Rounds each weight to the nearest value of a table times its group's scale; as bfloat16.

    A scale maps a group's largest weight to the table's; e8m0 ones follow OCP MX, e4m3 ones NVFP4:
    a float32 factor of the matrix, repeated in each row, brings them to at most 448.
    Ties go to the even code of a float type, and to the lower value of other tables.
    Paper: van Baalen et al. 2023, 2303.17951 (P327, fp8); Wu et al. 2023, 2312.08583 (P334, fp6);
        Liu et al. 2023, 2310.16836 (P337, llm_fp4: a real exponent bias is a real scale); Zhang et
        al. 2023, 2311.01792 (P311, afpq); 2603.08747 and 2509.23202 (P046, P258: mxfp4, nvfp4).
    Differs: scales are not searched, inputs are bfloat16 and not quantized.
    Cost: bits of a code and a scale's share, 4.25 for nf4; products cost as much as bfloat16's.
    Args:
        preset: values, group size and type of scales.
        values: 8, 16 or 64 numbers instead of the preset's values.
        group_size: weights along a row that share a scale, or "row"; None: the preset's.
        scale_type: type of scales; None: the preset's.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        preset = PRESETS[config.preset]
        with np.errstate(over="ignore"):
            values = np.asarray(config.values, np.float32)
        group_size = preset.group_size if config.group_size is None else config.group_size
        self.kernel = TableKernel(
            ",".join(map(str, values)) or preset.values,
            None if group_size == "row" else group_size,
            config.scale_type or preset.scale_type,
            preset.is_signed,
        )
        if len(values) and not (
            len(values) in (8, 16, 64)
            and np.isfinite(values).all()
            and values.min() < 0 < values.max()
        ):
            raise InvalidOption(
                f"option 'values' has {len(values)} numbers: expected 8, 16 or 64 finite ones, "
                "some of them below and some above zero"
            )
        if self.kernel.group_size == 16 and (self.kernel.bits > 4 or self.kernel.is_signed):
            raise InvalidOption(
                f"option 'group_size' of preset '{config.preset}' is 16: expected 32, 64, 128 or "
                "'row'"
            )

    @property
    def grid(self) -> Grid:
        kernel = self.kernel
        scale_bits = 8 * kernel.scale_dtype.itemsize * (2 if kernel.is_signed else 1)
        return Grid(
            self.config.preset,
            kernel.bits,
            kernel.group_size,
            scale_bits,
            row_bits=32 * kernel.has_factor,
        )

    def num_bytes(self, weight: Matrix | Packed) -> int:
        kernel, (num_rows, num_columns) = self.kernel, weight.shape
        together = 1 if kernel.group_size is None else max(kernel.group_size, STEP)
        if num_columns % together:
            raise InvalidOption(
                f"groups of {kernel.group_size} do not divide rows of {num_columns} weights in "
                "whole steps of 32: use a smaller group_size, or group_size 'row'"
            )
        return num_rows * kernel.row_bytes(num_columns)

    def pack(self, weight: Matrix | Packed) -> Packed:
        kernel, (num_rows, num_columns) = self.kernel, weight.shape
        if isinstance(weight, Packed):
            if weight.kernel == kernel.kernel:
                return weight
            weight = self.dequant(weight)
        data = np.empty(self.num_bytes(weight), np.uint8).reshape(num_rows, -1)
        step = max(1, _PIECE_WEIGHTS // num_columns)
        factor = _factor(weight, kernel, step) if kernel.has_factor else np.float32(1)
        for first in range(0, num_rows, step):
            rows = np.asarray(weight[first : first + step], np.float32)
            codes, scales = quantize(rows, kernel, factor)
            data[first : first + step] = kernel.pack(codes, scales, factor)
        return Packed(kernel.kernel, (num_rows, num_columns), data)


def _factor(weight: Matrix, kernel: TableKernel, step: int) -> np.float32:
    """What makes the largest scale of a matrix the largest e4m3: NVFP4's, of the whole tensor."""
    most = np.float32(0)
    for first in range(0, weight.shape[0], step):
        rows = np.asarray(weight[first : first + step], np.float32)
        most = np.maximum(most, np.abs(rows).max())  # keeps a NaN
    return np.float32(most / (_LARGEST_E4M3 * max(kernel.largest, -kernel.lowest)))


def quantize(
    weight: np.ndarray, kernel: TableKernel, factor: np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """Round [N, K] float32 to codes [N, K] uint8 and scales as stored [N, scales of a row].

    Raises `InvalidOption` if a finite weight needs a scale that its type does not hold.
    """
    num_rows, num_columns = weight.shape
    groups = weight.reshape(num_rows, -1, kernel.group_size or num_columns)
    top, bottom = kernel.largest, kernel.lowest
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        most = np.stack([np.maximum(groups.max(-1), 0), -np.minimum(groups.min(-1), 0)], -1)
        wanted = most / np.array([top, -bottom])
        if not kernel.is_signed:
            most, wanted = most.max(-1), wanted.max(-1)
        stored = _round_scales(most, wanted, kernel, factor)
        scales = kernel.scales_of(stored, factor)
        if not np.isfinite(scales).all() and np.isfinite(weight).all():
            raise InvalidOption(
                f"a scale is not finite as {kernel.scale_type}: use scale_type 'bfloat16'"
            )
        if kernel.is_signed:
            scales = np.where(groups < 0, scales[..., 1:], scales[..., :1])
        else:
            scales = scales[..., None]
        scaled = np.where(scales == 0, np.float32(0), groups / scales)
        scaled = np.where(np.isinf(groups), groups, scaled)  # stays on its side
        codes = _nearest(np.clip(scaled, bottom, top), kernel)
    return codes.reshape(num_rows, num_columns), stored.reshape(num_rows, -1)


def _round_scales(
    most: np.ndarray, wanted: np.ndarray, kernel: TableKernel, factor: np.float32
) -> np.ndarray:
    """Scales as stored, for the largest magnitudes and what maps these to the table's.

    NaN or infinity stay what they are.
    """
    if kernel.has_factor:
        ratio = np.where(flush(factor) == 0, np.float32(0), wanted / factor)
        return np.minimum(ratio, _LARGEST_E4M3).astype(kernel.scale_dtype)  # above by rounding only
    if kernel.scale_type != "e8m0":
        return wanted.astype(kernel.scale_dtype)
    if kernel.values in FLOAT_TYPES:  # floor(log2 most) - floor(log2 of the largest value)
        exponent = np.frexp(most)[1] - np.frexp(kernel.largest)[1]
    else:  # the smallest power of two that reaches
        exponent = np.frexp(wanted)[1] - (np.frexp(wanted)[0] == 0.5)
    biased = np.clip(exponent + 127, 0, 255)  # below 2^-126 all weights are zero
    stored = np.where(wanted == 0, 0, biased)
    return np.where(np.isfinite(wanted), stored, 255).astype(np.uint8)


def _nearest(scaled: np.ndarray, kernel: TableKernel) -> np.ndarray:
    """Codes of the values nearest to finite numbers within the table; zero for NaN."""
    dtype = FLOAT_TYPES.get(kernel.values)
    scaled = np.nan_to_num(scaled)
    if dtype is not None:
        return scaled.astype(dtype).view(np.uint8)
    values, codes = np.unique(kernel.table, return_index=True)
    middles = (values[1:] + values[:-1]) / np.float32(2)
    return codes[np.searchsorted(middles, scaled)].astype(np.uint8)
