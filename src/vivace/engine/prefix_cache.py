"""Prefixes by content: a keyed hash chain finds them, the stored content proves them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

from vivace.plan import ResolvedPlan

__all__ = ["PrefixCache", "PrefixNode", "fingerprint_of", "keyed_hash"]

Hash = Callable[[bytes], bytes]


def keyed_hash(key: bytes | None = None) -> Hash:
    """blake2b under a key of at most 64 bytes, a random one by default."""
    key = os.urandom(32) if key is None else key
    return lambda data: hashlib.blake2b(data, key=key, digest_size=32).digest()


def fingerprint_of(plan: ResolvedPlan) -> list[tuple[str, str, str]]:
    """Everything a plan says: a few needless misses cost less than one wrong hit."""
    return sorted(
        (seam, technique.name, repr(technique.options()))
        for seam, techniques in plan.techniques.items()
        for technique in techniques
    )


class PrefixNode:
    """One full block of a known prefix, and where its keys and values lie in each layer group.

    A root stands for no block: its content names everything else that keys and values depend on.
    """

    __slots__ = ("blocks", "content", "key", "num_uses", "parent")

    def __init__(
        self, key: bytes, parent: PrefixNode | None, content: bytes, num_groups: int
    ) -> None:
        self.key = key
        self.parent = parent
        self.content = content
        self.blocks: list[int | None] = [None] * num_groups
        self.num_uses = 0  # children, blocks and tables that point here; none left: forgotten

    @property
    def root(self) -> PrefixNode:
        node = self
        while node.parent is not None:
            node = node.parent
        return node


class PrefixCache:
    """A tree of prefixes, addressed by `hash(parent's key + content)`.

    Two contents with one key never share: the first to come keeps the key.
    """

    def __init__(self, num_groups: int, hash: Hash) -> None:
        self.num_groups = num_groups
        self._hash = hash
        self._nodes: dict[bytes, PrefixNode] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def find(self, parent: PrefixNode | None, content: bytes) -> PrefixNode | None:
        node = self._nodes.get(self._key(parent, content))
        return node if _is(node, parent, content) else None

    def extend(self, parent: PrefixNode | None, content: bytes) -> PrefixNode | None:
        """Find or make the node and count one more use of it; `None` if its key is taken."""
        key = self._key(parent, content)
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = PrefixNode(key, parent, content, self.num_groups)
            if parent is not None:
                self.hold(parent)
        elif not _is(node, parent, content):
            return None
        self.hold(node)
        return node

    def hold(self, node: PrefixNode) -> None:
        node.num_uses += 1

    def drop(self, node: PrefixNode) -> None:
        """Undo one `hold`; a node without uses is forgotten, and its parent dropped in turn."""
        link: PrefixNode | None = node
        while link is not None:
            link.num_uses -= 1
            if link.num_uses:
                return
            del self._nodes[link.key]
            link = link.parent

    def _key(self, parent: PrefixNode | None, content: bytes) -> bytes:
        return self._hash(b"root:" + content if parent is None else parent.key + content)


def _is(node: PrefixNode | None, parent: PrefixNode | None, content: bytes) -> bool:
    return node is not None and node.parent is parent and node.content == content
