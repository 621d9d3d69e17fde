"""Canonical reduction: gradients of V virtual shards in, their sum out, in one fixed order of additions.

Floating-point addition is not associative, so an ordinary all-reduce gives other bits at another world size. Here the
sum is a fixed binary tree over the virtual shards 0..V-1: node (level, i) covers [i * 2^level, (i + 1) * 2^level), cut
at V, and is the sum of its two children. Which rank computes a node does not matter, so any contiguous division of the
virtual shards over ranks (any world size from 1 to V) gives the same bits.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from sepdist.data.order import owned_virtual_shards

Node = tuple[int, int]  # (level, index)


class TreeSum:
    """Adds leaves as they come, left to right, and joins siblings at once, so that it holds O(log V) partial sums."""

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
        """The sum of all leaves, once every one of them has been pushed."""
        assert len(self.partials) == 1 and self.partials[0][0][1] == 0, [
            node for node, _ in self.partials
        ]
        return self.partials[0][1]


def covering_nodes(leaves: range, num_leaves: int) -> list[Node]:
    """The nodes whose values a rank that owns `leaves` ends up with."""
    tree = TreeSum(num_leaves)
    for leaf in leaves:
        tree.push((0, leaf), torch.zeros(()))
    return [node for node, _ in tree.partials]


def tree_sum(leaves: list[Tensor]) -> Tensor:
    """The canonical sum of all leaves in one process."""
    tree = TreeSum(len(leaves))
    for position, leaf in enumerate(leaves):
        tree.push((0, position), leaf)
    return tree.result()


def reduce_canonically(
    local: TreeSum, rank: int, world_size: int, block_elements: int = 4_000_000
) -> Tensor:
    """The canonical sum over all ranks' leaves, the same bits on every rank; collective.

    `local` holds this rank's leaves (1-D, one length on all ranks), those of `owned_virtual_shards`, and is used up:
    the sum overwrites one of its tensors. Traffic is that of a ring all-reduce, times the number of partial sums per
    rank (1 where V and the world size are powers of two). Beside `local` it holds a few times `block_elements` numbers.
    """
    if world_size == 1:
        return local.result()
    num_leaves = local.num_leaves
    nodes = [
        covering_nodes(owned_virtual_shards(num_leaves, other, world_size), num_leaves)
        for other in range(world_size)
    ]
    mine = [value for _, value in local.partials]
    assert [node for node, _ in local.partials] == nodes[rank], (
        "the leaves pushed are not those this rank owns"
    )
    total = mine[0]
    for start in range(0, len(total), block_elements):
        block = torch.stack([value[start : start + block_elements] for value in mine])
        total[start : start + block_elements] = _reduce_block(block, nodes, num_leaves)
    return total


def _reduce_block(mine_NL: Tensor, nodes: list[list[Node]], num_leaves: int) -> Tensor:
    """The sum [L] of every rank's N partial sums; `nodes` says by rank which they are."""
    world_size, (num_mine, length) = len(nodes), mine_NL.shape
    chunk = -(-length // world_size)
    # Chunk c of every partial sum goes to rank c, which finishes the tree on it.
    padded = torch.nn.functional.pad(mine_NL, (0, chunk * world_size - length))
    outgoing = padded.view(num_mine, world_size, chunk).transpose(0, 1).contiguous().view(-1)
    incoming = outgoing.new_empty(sum(map(len, nodes)) * chunk)
    dist.all_to_all_single(
        incoming,
        outgoing,
        output_split_sizes=[len(part) * chunk for part in nodes],
        input_split_sizes=[num_mine * chunk] * world_size,
    )
    tree = TreeSum(num_leaves)
    for node, value in zip(
        [node for part in nodes for node in part], incoming.view(-1, chunk), strict=True
    ):
        tree.push(node, value)
    gathered = outgoing.new_empty(chunk * world_size)
    dist.all_gather_into_tensor(gathered, tree.result().contiguous())
    return gathered[:length]
