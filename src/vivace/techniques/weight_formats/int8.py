"""Weights as 8-bit integers, with a scale for each group."""

from __future__ import annotations

from dataclasses import dataclass

from vivace.registry import TechniqueInfo
from vivace.techniques.weight_formats._groupwise import GroupSize, GroupwiseFormat, ScaleType

INFO = TechniqueInfo(
    summary="8-bit integers in groups, 8-bit inputs: 8 bits a weight and a scale a row"
)


@dataclass(frozen=True)
class Config:
    group_size: GroupSize = "row"
    symmetric: bool = True
    scale_type: ScaleType = "float32"


class Int8(GroupwiseFormat):
    """Rounds each weight to one of 256 whole multiples of its group's scale.

    Cost: 8 bits per weight, and a scale a row, read per token by default.
    Args:
        group_size: weights along a row that share a scale, or "row".
        symmetric: zero is the middle code; else each group stores a zero point of its own.
        scale_type: float type of scales; "e8m0" are powers of two.
    """

    bits = 8
