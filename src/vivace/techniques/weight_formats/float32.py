"""Weights as float32, multiplied in float32."""

from __future__ import annotations

from dataclasses import dataclass

from vivace.registry import TechniqueInfo
from vivace.techniques.weight_formats._plain import PlainFormat

INFO = TechniqueInfo(summary="32-bit floats, 4 bytes a weight")


@dataclass(frozen=True)
class Config:
    """No options."""


class Float32(PlainFormat):
    """Stores and multiplies in float32.

    Cost: 4 bytes per weight read per token.
    """

    storage = "float32"

    @property
    def rounds_inputs(self) -> bool:
        return True  # to float32, which changes nothing
