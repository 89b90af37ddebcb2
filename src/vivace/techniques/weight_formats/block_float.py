"""Block floating point: whole numbers that share an exponent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vivace.registry import TechniqueInfo
from vivace.techniques.weight_formats._groupwise import GroupwiseFormat, ScaleType

INFO = TechniqueInfo(
    summary="blocks of signed mantissas with a shared 8-bit exponent, 8-bit inputs",
    papers=("P335",),
)


@dataclass(frozen=True)
class Config:
    mantissa_bits: Literal[4, 8] = 4
    group_size: Literal[32, 64, 128] = 32

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def scale_type(self) -> ScaleType:
        return "e8m0"


class BlockFloat(GroupwiseFormat):
    """Rounds each weight to a whole multiple of its block's power of two: group-wise integers.

    Paper: Accurate Block Quantization in LLMs with Outliers, Trukhanov and Soloveychik 2024,
        2403.20137 (P335), section 2: BFP12 and BFP16.
    Differs: mantissas are two's complement; where the largest would round to more than they hold,
        the exponent is one higher. K-sort, its order of channels, is for the cache of keys.
    Cost: mantissa_bits + 8 / group_size bits per weight read per token.
    Args:
        mantissa_bits: sign included.
        group_size: weights along a row that share an exponent.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.bits = config.mantissa_bits
