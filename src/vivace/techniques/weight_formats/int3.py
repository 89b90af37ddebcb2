"""Weights as 3-bit integers, with a scale for each group."""

from __future__ import annotations

from dataclasses import dataclass

from vivace.registry import TechniqueInfo
from vivace.techniques.weight_formats._groupwise import GroupSize, GroupwiseFormat, ScaleType

INFO = TechniqueInfo(summary="3-bit integers in groups, 8-bit inputs: 3.5 bits a weight by default")


@dataclass(frozen=True)
class Config:
    group_size: GroupSize = 32
    symmetric: bool = True
    scale_type: ScaleType = "float16"


class Int3(GroupwiseFormat):
    """Rounds each weight to one of 8 whole multiples of its group's scale.

    Cost: 3.5 bits per weight read per token by default.
    Args:
        group_size: weights along a row that share a scale, or "row".
        symmetric: zero is the middle code; else each group stores a zero point of its own.
        scale_type: float type of scales; "e8m0" are powers of two.
    """

    bits = 3
