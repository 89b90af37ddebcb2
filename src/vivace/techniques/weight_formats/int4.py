"""Weights as 4-bit integers, with a scale for each group."""

from __future__ import annotations

from dataclasses import dataclass

from vivace.registry import TechniqueInfo
from vivace.techniques.weight_formats._groupwise import GroupSize, GroupwiseFormat, ScaleType

INFO = TechniqueInfo(summary="4-bit integers in groups, 8-bit inputs: 4.5 bits a weight by default")


@dataclass(frozen=True)
class Config:
    group_size: GroupSize = 32
    symmetric: bool = True
    scale_type: ScaleType = "float16"


class Int4(GroupwiseFormat):
    """Rounds each weight to one of 16 whole multiples of its group's scale.

    Cost: 4.5 bits per weight read per token by default.
    Args:
        group_size: weights along a row that share a scale, or "row".
        symmetric: zero is the middle code; else each group stores a zero point of its own.
        scale_type: float type of scales; "e8m0" are powers of two.
    """

    bits = 4
