"""Canonical reduction: sum the gradients of V virtual shards in one fixed order of additions.

Floating-point addition is not associative, so an all-reduce gives other bits at another world size.
Here the sum is a fixed binary tree over the virtual shards 0..V-1: node (level, i) covers
[i * 2^level, (i + 1) * 2^level), cut at V, and is the sum of its two children. It does not matter
which rank computes a node, so any contiguous division of the virtual shards over 1 to V ranks gives
the same bits.
"""

import itertools
import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sepdist.data.order import owned_virtual_shards

Node = tuple[int, int]  # (level, index)


class TreeSum:
    """Adds leaves from left to right; joins siblings at once, to hold O(log V) partial sums."""

    def __init__(self, num_leaves: int, add: Callable[[Any, Any], Any] = operator.add) -> None:
        self.num_leaves = num_leaves
        self.partials: list[tuple[Node, Any]] = []
        self._add = add

    def push(self, node: Node, value: Any) -> None:
        """Append the value of the next node to the right."""
        (level, index), total = node, value
        while True:
            if self.partials and index % 2 == 1 and self.partials[-1][0] == (level, index - 1):
                total = self._add(self.partials.pop()[1], total)
            elif not (index % 2 == 0 and index > 0 and ((index + 1) << level) >= self.num_leaves):
                break  # a left child whose sibling exists (or the root): wait for it
            level, index = level + 1, index >> 1
        self.partials.append(((level, index), total))

    def result(self) -> Any:
        """Return the sum of all leaves, once every one of them has been pushed."""
        [((_, index), total)] = self.partials
        assert index == 0, index
        return total


@cache
def plan(num_leaves: int, world_size: int) -> tuple[list[list[Node]], list[Any]]:
    """Return each rank's nodes, and the additions that finish the tree in a matrix of their values.

    (a, b) adds rows b to rows a, in place, for a whole level if it is even; row 0 gets the total.
    """
    levels: dict[int, list[tuple[int, int]]] = {}

    def add(left: tuple[int, int], right: tuple[int, int]) -> tuple[int, int]:
        level = max(left[0], right[0])
        levels.setdefault(level, []).append((left[1], right[1]))
        return level + 1, left[1]

    tree, rows, nodes = TreeSum(num_leaves, add), itertools.count(), []
    for rank in range(world_size):
        part = TreeSum(num_leaves)
        for leaf in owned_virtual_shards(num_leaves, rank, world_size):
            part.push((0, leaf), 0)
        nodes.append([node for node, _ in part.partials])
        for node in nodes[-1]:
            tree.push(node, (0, next(rows)))
    additions: list[list[slice]] = []
    for _, pairs in sorted(levels.items()):
        (a, b), number = pairs[0], len(pairs)
        step = pairs[-1][0] - pairs[-2][0] if number > 1 else 1
        even = pairs == [(a + i * step, b + i * step) for i in range(number)]
        level = [slice(first, first + number * step, step) for first in (a, b)]
        additions += [level] if even else [[slice(at, at + 1) for at in pair] for pair in pairs]
    return nodes, additions


def reduce_canonically(
    local: TreeSum, rank: int, world_size: int, block_elements: int = 4_000_000
) -> Tensor:
    """Return the canonical sum over all ranks' leaves, the same bits on every rank; collective.

    `local` holds the leaves of this rank's virtual shards (1-D, of one length on all ranks) and is
    used up: the sum overwrites one of its tensors. Traffic is that of a ring all-reduce, times the
    number of partial sums per rank (1 if V and the world size are powers of two). Memory besides
    `local` is a few times `block_elements` numbers.
    """
    if world_size == 1:
        return local.result()
    nodes, additions = plan(local.num_leaves, world_size)
    mine = [value for _, value in local.partials]
    assert [node for node, _ in local.partials] == nodes[rank], "leaves of another rank were pushed"
    counts, total = [len(theirs) for theirs in nodes], mine[0]
    even = min(counts) == max(counts)  # then there is no need to check a thousand sizes
    for start in range(0, len(total), block_elements):
        block_NL = torch.stack([value[start : start + block_elements] for value in mine])
        length = block_NL.shape[1]
        chunk = -(-length // world_size)
        # Chunk c of every partial sum goes to rank c, which finishes the tree on it.
        padded = torch.nn.functional.pad(block_NL, (0, chunk * world_size - length))
        outgoing = padded.view(len(mine), world_size, chunk).transpose(0, 1).contiguous().view(-1)
        incoming = outgoing.new_empty(sum(counts) * chunk)
        splits: Any = [[count * chunk for count in counts], [len(mine) * chunk] * world_size]
        dist.all_to_all_single(incoming, outgoing, *([] if even else splits))
        rows = incoming.view(-1, chunk)
        for into, rest in additions:
            rows[into].add_(rows[rest])
        gathered = outgoing.new_empty(chunk * world_size)
        dist.all_gather_into_tensor(gathered, rows[0])
        total[start : start + block_elements] = gathered[:length]
    return total
