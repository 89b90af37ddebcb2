"""Blocks of the cache: who owns them, which are free, which hold a prefix worth keeping."""

from __future__ import annotations

import math
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from vivace.blocks import LayerGroup
from vivace.engine.prefix_cache import Hash, PrefixCache, PrefixNode, keyed_hash

__all__ = ["BlockPool", "BlockTable", "Copy", "GroupPool"]


@dataclass(frozen=True, slots=True)
class Copy:
    """A block to copy before the step writes: copy on write."""

    group: int
    source: int
    target: int


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence per layer group, in logical order."""

    blocks: list[array[int]]  # [group][i]: the block of logical index num_dropped[group] + i
    num_dropped: list[int]  # leading blocks that fell out of the group's window
    node: PrefixNode | None  # the end of the registered prefix; None: after a hash collision
    num_registered: int = 0  # full blocks up to `node`

    def num_blocks(self, group: int) -> int:
        return self.num_dropped[group] + len(self.blocks[group])


class GroupPool:
    """The blocks of one layer group: reference counts, and two kinds of free blocks.

    A free block that holds a registered prefix can be shared again until it is taken for
    something else; the one released longest ago goes first, and only when no empty one is left.
    """

    def __init__(self, num_blocks: int, forget: Callable[[PrefixNode, int], None]) -> None:
        self.num_blocks = num_blocks
        self.references = [0] * num_blocks
        self.nodes: dict[int, PrefixNode] = {}  # registered blocks
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._forget = forget

    @property
    def num_free(self) -> int:
        return len(self._empty) + len(self._cached)

    def allocate(self) -> int:
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget(self.nodes.pop(block), block)
        self.references[block] = 1
        return block

    def share(self, block: int) -> None:
        if self.references[block] == 0:
            del self._cached[block]
        self.references[block] += 1

    def release(self, block: int) -> None:
        assert self.references[block] > 0, "a block was released twice"
        self.references[block] -= 1
        if self.references[block] == 0:
            if block in self.nodes:
                self._cached[block] = None
            else:
                self._empty.append(block)

    def check(self, owners: Counter[int]) -> None:
        """Free + used = total; owners = references. Raises `AssertionError`."""
        free = [*self._empty, *self._cached]
        used = {block for block, count in enumerate(self.references) if count}
        assert len(free) == len(set(free)), "a block is free twice"
        assert used.isdisjoint(free), "a block is free and used"
        assert len(free) + len(used) == self.num_blocks, "free + used is not the total"
        assert owners == Counter({b: self.references[b] for b in used}), "owners are not references"
        assert all(block in self.nodes for block in self._cached), "an empty block counts as cached"
        assert not any(block in self.nodes for block in self._empty), "a cached block counts empty"


class BlockPool:
    """All layer groups' blocks, and the tables of sequences over them.

    Args:
        groups: the model's layer groups.
        num_blocks: blocks per layer group.
        block_size: entries in a block.
        hash: the prefix cache's hash, keyed at random by default.
        merge_entries: a window lets go of whole runs of this many entries. Attention merges run
            by run from where a segment begins: elsewhere its bits would differ.
    """

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        num_blocks: Sequence[int],
        block_size: int,
        hash: Hash | None = None,
        merge_entries: int = 1,
    ) -> None:
        self.block_size = block_size
        self._blocks_per_run = math.lcm(block_size, merge_entries) // block_size
        self.windows = [group.window for group in groups]
        self.cache = PrefixCache(len(groups), hash or keyed_hash())
        self.groups = [
            GroupPool(count, self._forgetter(index)) for index, count in enumerate(num_blocks)
        ]

    def _forgetter(self, group: int) -> Callable[[PrefixNode, int], None]:
        def forget(node: PrefixNode, block: int) -> None:
            assert node.blocks[group] == block
            node.blocks[group] = None
            self.cache.drop(node)

        return forget

    @property
    def num_free(self) -> list[int]:
        return [group.num_free for group in self.groups]

    @property
    def num_used(self) -> int:
        return sum(group.num_blocks - group.num_free for group in self.groups)

    @property
    def capacity_tokens(self) -> int:
        """The longest sequence that fits when it is alone."""
        return self.block_size * min(group.num_blocks for group in self.groups)

    # -------------------------------------------------------- tables

    def open(self, identity: bytes, contents: Iterable[bytes]) -> BlockTable:
        """A table that starts with the longest known prefix of `contents`, one item per block.

        `identity` holds all that keys and values depend on besides the content.
        """
        node = self.cache.extend(None, identity)
        table = BlockTable([array("i") for _ in self.groups], [0] * len(self.groups), node)
        if node is None:
            return table
        found = []
        for content in contents:
            node = self.cache.find(node, content)
            if node is None:
                break
            found.append(node)
        count = self._usable(found)
        if count:
            for group in range(len(self.groups)):
                self._adopt(table, group, found[:count])
            self._move(table, found[count - 1])
            table.num_registered = count
        return table

    def _usable(self, found: list[PrefixNode]) -> int:
        """How many leading blocks can be shared: every block a next row reads is still there."""
        for count in range(len(found), 0, -1):
            if all(
                node.blocks[group] is not None
                for group in range(len(self.groups))
                for node in found[self._first_needed(group, count * self.block_size) : count]
            ):
                return count
        return 0

    def _adopt(self, table: BlockTable, group: int, nodes: list[PrefixNode]) -> None:
        first = self._first_needed(group, len(nodes) * self.block_size)
        table.num_dropped[group] = first
        for node in nodes[first:]:
            block = node.blocks[group]
            assert block is not None
            self.groups[group].share(block)
            table.blocks[group].append(block)

    def _first_needed(self, group: int, num_entries: int) -> int:
        """The first block to keep for rows at entry `num_entries - 1` and later."""
        window = self.windows[group]
        if window is None or window >= num_entries:
            return 0
        first = (num_entries - window) // self.block_size
        return first - first % self._blocks_per_run

    def _move(self, table: BlockTable, node: PrefixNode) -> None:
        """Point a table at another node, which it then holds instead."""
        assert table.node is not None
        self.cache.hold(node)
        self.cache.drop(table.node)
        table.node = node

    def fork(self, table: BlockTable, num_entries: int) -> BlockTable:
        """A second owner of the blocks that hold the first `num_entries` entries, all committed."""
        count = -(-num_entries // self.block_size)
        forked = BlockTable([], list(table.num_dropped), table.node, table.num_registered)
        for group, blocks in enumerate(table.blocks):
            kept = blocks[: count - table.num_dropped[group]]
            for block in kept:
                self.groups[group].share(block)
            forked.blocks.append(kept)
        if forked.node is not None:
            self.cache.hold(forked.node)
        return forked

    def release(self, table: BlockTable) -> None:
        """Give all blocks back, the last ones first: a prefix outlives what follows it."""
        for group, blocks in zip(self.groups, table.blocks, strict=True):
            for block in reversed(blocks):
                group.release(block)
        if table.node is not None:
            self.cache.drop(table.node)

    # -------------------------------------------------------- writing

    def blocks_needed(self, table: BlockTable, start: int, stop: int) -> list[int]:
        """Blocks to allocate per group before rows may write entries [start, stop)."""
        needed = []
        for group in range(len(self.groups)):
            new = max(0, -(-stop // self.block_size) - table.num_blocks(group))
            needed.append(new + (self._shared_at(table, group, start) is not None))
        return needed

    def can_reserve(self, table: BlockTable, start: int, stop: int) -> bool:
        needed = self.blocks_needed(table, start, stop)
        return all(n <= group.num_free for n, group in zip(needed, self.groups, strict=True))

    def reserve(self, table: BlockTable, start: int, stop: int) -> list[Copy]:
        """Make entries [start, stop) writable; the caller carries out the copies, in order."""
        copies = []
        for index, group in enumerate(self.groups):
            shared = self._shared_at(table, index, start)
            if shared is not None:
                blocks = table.blocks[index]
                source, blocks[shared] = blocks[shared], group.allocate()
                group.release(source)
                copies.append(Copy(index, source, blocks[shared]))
            while table.num_blocks(index) * self.block_size < stop:
                table.blocks[index].append(group.allocate())
        return copies

    def _shared_at(self, table: BlockTable, group: int, start: int) -> int | None:
        """The place in the table of a block that entry `start` is in, if others own it too.

        It is the last block of a fork: full ones are not written, later ones hold nothing yet.
        """
        place = start // self.block_size - table.num_dropped[group]
        blocks = table.blocks[group]
        if place < len(blocks) and self.groups[group].references[blocks[place]] > 1:
            return place
        return None

    def commit(self, table: BlockTable, num_entries: int, content: Callable[[int], bytes]) -> None:
        """Register blocks that are now full, and let go of those that left a window.

        A block whose content is registered already is exchanged for the registered one: by
        exactness they hold the same bits.
        """
        while table.node is not None and table.num_registered < num_entries // self.block_size:
            node = self.cache.extend(table.node, content(table.num_registered))
            if node is None:
                self.cache.drop(table.node)
                table.node = None
                break
            for group in range(len(self.groups)):
                self._register(table, group, node)
            self.cache.drop(table.node)
            table.node = node
            table.num_registered += 1
        for index, group in enumerate(self.groups):
            extra = self._first_needed(index, num_entries) - table.num_dropped[index]
            if extra > 0:
                for block in table.blocks[index][:extra]:
                    group.release(block)
                del table.blocks[index][:extra]
                table.num_dropped[index] += extra

    def _register(self, table: BlockTable, group: int, node: PrefixNode) -> None:
        pool, blocks = self.groups[group], table.blocks[group]
        place = table.num_registered - table.num_dropped[group]
        block, known = blocks[place], node.blocks[group]
        if known is None:
            node.blocks[group] = block
            pool.nodes[block] = node
            self.cache.hold(node)
        else:
            pool.share(known)
            pool.release(block)
            blocks[place] = known

    # -------------------------------------------------------- checking

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Every invariant of counts and sharing. Raises `AssertionError`."""
        tables = list(tables)
        for index, group in enumerate(self.groups):
            group.check(Counter(block for table in tables for block in table.blocks[index]))
            for block, node in group.nodes.items():
                assert node.blocks[index] == block, "a node does not know its block"
            for table in tables:
                nodes = (group.nodes.get(block) for block in table.blocks[index])
                roots = {node.root for node in nodes if node is not None}
                if table.node is not None:
                    assert roots <= {table.node.root}, "a block is shared across identities"
