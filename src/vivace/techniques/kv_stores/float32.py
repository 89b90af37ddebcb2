"""Keys and values as float32."""

from __future__ import annotations

from dataclasses import dataclass

from vivace.registry import TechniqueInfo
from vivace.techniques.kv_stores._plain import PlainStore

INFO = TechniqueInfo(summary="float32 keys and values, 4 bytes an element")


@dataclass(frozen=True)
class Config:
    """No options."""


class Float32(PlainStore):
    """Stores keys and values as float32; attention computes in float32.

    Cost: 4 bytes per element read per token.
    """

    storage = "float32"
