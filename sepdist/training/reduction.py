"""Canonical reduction: sum the gradients of V virtual shards in one fixed order of additions.

Floating-point addition is not associative, so an all-reduce gives other bits at another world size.
Here the sum is a fixed binary tree over the virtual shards 0..V-1: node (level, i) covers
[i * 2^level, (i + 1) * 2^level), cut at V, and is the sum of its two children. It does not matter
which rank computes a node, so any contiguous division of the virtual shards over 1 to V ranks gives
the same bits.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from sepdist.data.order import owned_virtual_shards

Node = tuple[int, int]  # (level, index)


class TreeSum:
    """Adds leaves from left to right; joins siblings at once, to hold O(log V) partial sums."""

    def __init__(self, num_leaves: int) -> None:
        self.num_leaves = num_leaves
        self.partials: list[tuple[Node, Tensor]] = []

    def push(self, node: Node, value: Tensor) -> None:
        """Append the value of the next node to the right."""
        (level, index), total = node, value
        while True:
            if self.partials and index % 2 == 1 and self.partials[-1][0] == (level, index - 1):
                total = self.partials.pop()[1] + total
            elif not (index % 2 == 0 and index > 0 and ((index + 1) << level) >= self.num_leaves):
                break  # a left child whose sibling exists (or the root): wait for it
            level, index = level + 1, index >> 1
        self.partials.append(((level, index), total))

    def result(self) -> Tensor:
        """Return the sum of all leaves, once every one of them has been pushed."""
        [((_, index), total)] = self.partials
        assert index == 0, index
        return total


def covering_nodes(leaves: range, num_leaves: int) -> list[Node]:
    """Return the nodes whose values a rank that owns `leaves` ends up with."""
    tree = TreeSum(num_leaves)
    for leaf in leaves:
        tree.push((0, leaf), torch.zeros(()))
    return [node for node, _ in tree.partials]


def tree_sum(leaves: list[Tensor]) -> Tensor:
    """Return the canonical sum of all leaves in one process."""
    tree = TreeSum(len(leaves))
    for position, leaf in enumerate(leaves):
        tree.push((0, position), leaf)
    return tree.result()


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
    num_leaves = local.num_leaves
    nodes = [
        covering_nodes(owned_virtual_shards(num_leaves, other, world_size), num_leaves)
        for other in range(world_size)
    ]
    mine = [value for _, value in local.partials]
    assert [node for node, _ in local.partials] == nodes[rank], "leaves of another rank were pushed"
    total = mine[0]
    for start in range(0, len(total), block_elements):
        block = torch.stack([value[start : start + block_elements] for value in mine])
        total[start : start + block_elements] = _reduce_block(block, nodes, num_leaves)
    return total


def _reduce_block(mine_NL: Tensor, nodes: list[list[Node]], num_leaves: int) -> Tensor:
    """Return the sum [L] of every rank's N partial sums, whose nodes are listed by rank."""
    world_size, (num_mine, length) = len(nodes), mine_NL.shape
    chunk = -(-length // world_size)
    # Chunk c of every partial sum goes to rank c, which finishes the tree on it.
    padded = torch.nn.functional.pad(mine_NL, (0, chunk * world_size - length))
    outgoing = padded.view(num_mine, world_size, chunk).transpose(0, 1).contiguous().view(-1)
    incoming = outgoing.new_empty(sum(map(len, nodes)) * chunk)
    dist.all_to_all_single(
        incoming,
        outgoing,
        output_split_sizes=[len(theirs) * chunk for theirs in nodes],
        input_split_sizes=[num_mine * chunk] * world_size,
    )
    tree = TreeSum(num_leaves)
    in_order = [node for theirs in nodes for node in theirs]
    for node, value in zip(in_order, incoming.view(-1, chunk), strict=True):
        tree.push(node, value)
    gathered = outgoing.new_empty(chunk * world_size)
    dist.all_gather_into_tensor(gathered, tree.result().contiguous())
    return gathered[:length]
