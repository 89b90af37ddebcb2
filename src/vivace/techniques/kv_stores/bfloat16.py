"""Keys and values as bfloat16."""

from __future__ import annotations

from dataclasses import dataclass

from vivace.registry import TechniqueInfo
from vivace.techniques.kv_stores._plain import PlainStore

INFO = TechniqueInfo(summary="bfloat16 keys and values, 2 bytes an element")


@dataclass(frozen=True)
class Config:
    """No options."""


class Bfloat16(PlainStore):
    """Stores keys and values as bfloat16.

    Attention rounds what they are multiplied with, queries and weights, to bfloat16 too; sums are
    float32.

    Cost: 2 bytes per element read per token.
    """

    storage = "bfloat16"
