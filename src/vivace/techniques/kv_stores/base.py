"""Key/value stores: the layout of a cache block and what reading it gives.

A block holds `block_size` entries of one layer of a layer group, keys and values apart. Executors
own the storage; a store says how many bytes an entry takes and what rounding it does.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from vivace.blocks import LayerGroup
from vivace.registry import Technique

__all__ = ["KVLayout", "KVStore"]


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Storage of one layer group: elements of `dtype`, and bytes per token over all its layers."""

    dtype: str
    bytes_per_token: int


class KVStore(Technique):
    @property
    @abstractmethod
    def kernel(self) -> str:
        """The name under which native code knows this store."""

    @abstractmethod
    def layout(self, group: LayerGroup) -> KVLayout: ...

    @abstractmethod
    def stored(self, array: Any) -> Any:
        """What reading back a key or value gives: [N, G, D] float32 in and out."""
