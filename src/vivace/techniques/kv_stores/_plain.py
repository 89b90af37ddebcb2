"""The family of plain float stores: an element is stored as itself."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from array_api_compat import array_namespace

from vivace.blocks import LayerGroup
from vivace.techniques.kv_stores.base import KVLayout, KVStore

__all__ = ["PlainStore"]


class PlainStore(KVStore):
    storage: str

    @property
    def kernel(self) -> str:
        return self.storage

    @property
    def _dtype(self) -> np.dtype:
        return np.dtype(getattr(ml_dtypes, self.storage, self.storage))

    def layout(self, group: LayerGroup) -> KVLayout:
        values = 2 * group.num_layers * group.num_kv_heads * group.head_dim
        return KVLayout(self.storage, values * self._dtype.itemsize)

    def stored(self, array: Any) -> Any:
        if isinstance(array, np.ndarray):
            return array.astype(self._dtype).astype(np.float32)
        xp = array_namespace(array)
        return xp.astype(xp.astype(array, getattr(xp, self.storage)), xp.float32)
