"""Tests in this folder need what `make peers` builds, and are skipped without it."""

import pytest
from peer import has_peers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = pytest.mark.skip(reason="make peers builds llama.cpp")
    for item in items:
        if not has_peers() and item.path.parent.name == "peers":
            item.add_marker(reason)
