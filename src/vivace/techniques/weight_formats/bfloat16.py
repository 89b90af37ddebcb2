"""Weights as bfloat16, with inputs rounded to bfloat16 or kept in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vivace.registry import TechniqueInfo
from vivace.techniques.weight_formats._plain import PlainFormat

INFO = TechniqueInfo(
    summary="16-bit floats (8 bits of exponent, 8 of precision), 2 bytes a weight", papers=("P333",)
)


@dataclass(frozen=True)
class Config:
    arithmetic: Literal["bfloat16", "float32"] = "bfloat16"


class Bfloat16(PlainFormat):
    """Stores bfloat16; products are exact and sums are float32.

    Paper: Yuan et al. 2025, arXiv 2506.09501 (LayerCast): 16-bit storage, float32 arithmetic.
    Differs: the option `arithmetic="float32"` keeps inputs in float32 and widens each weight as it
    is read instead of casting a layer at a time.
    Cost: 2 bytes per weight read per token.
    Args:
        arithmetic: type to which a linear's inputs are rounded.
    """

    storage = "bfloat16"
    config: Config

    @property
    def rounds_inputs(self) -> bool:
        return self.config.arithmetic == "bfloat16"
