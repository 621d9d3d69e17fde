"""The canonical sum is one fixed tree of additions, whichever rank computes a node."""

import random

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from sepdist.data.order import owned_virtual_shards
from sepdist.training.reduction import TreeSum, plan, reduce_canonically


def leaves_of(num_leaves: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_leaves)
    spread = random.Random(num_leaves)
    return [
        torch.randn(11, generator=generator) * 10 ** spread.uniform(-4, 4)
        for _ in range(num_leaves)
    ]


def tree_sum(leaves: list[Tensor]) -> Tensor:
    tree = TreeSum(len(leaves))
    for position, leaf in enumerate(leaves):
        tree.push((0, position), leaf)
    return tree.result()


def recursive_sum(leaves: list[Tensor]) -> Tensor:
    """The definition, top down: the left child has the largest power of two below the total."""
    if len(leaves) == 1:
        return leaves[0]
    half = 1
    while half * 2 < len(leaves):
        half *= 2
    return recursive_sum(leaves[:half]) + recursive_sum(leaves[half:])


@pytest.mark.parametrize("num_leaves", range(1, 34))
def test_the_tree_sum_is_the_recursive_definition_to_the_last_bit(num_leaves: int) -> None:
    leaves = leaves_of(num_leaves)
    assert torch.equal(tree_sum(leaves), recursive_sum(leaves))


@pytest.mark.parametrize("num_leaves", range(1, 18))
def test_any_contiguous_division_over_ranks_gives_the_same_bits(num_leaves: int) -> None:
    leaves = leaves_of(num_leaves)
    for world_size in range(1, num_leaves + 1):
        nodes, additions = plan(num_leaves, world_size)
        rows = []
        for rank in range(world_size):
            owned = owned_virtual_shards(num_leaves, rank, world_size)
            part = TreeSum(num_leaves)
            for leaf in owned:
                part.push((0, leaf), leaves[leaf])
            assert nodes[rank] == [node for node, _ in part.partials]
            rows += [value for _, value in part.partials]
        matrix = torch.stack(rows)
        for into, rest in additions:
            matrix[into].add_(matrix[rest])
        assert torch.equal(matrix[0], recursive_sum(leaves))


@pytest.mark.parametrize(("num_leaves", "world_size"), [(1024, 1024), (1024, 64), (96, 96)])
def test_a_level_of_the_tree_is_one_addition(num_leaves, world_size) -> None:
    nodes, additions = plan(num_leaves, world_size)
    assert [len(one) for one in nodes] == [1] * world_size
    assert len(additions) == (world_size - 1).bit_length()
    rows = torch.arange(world_size)
    assert sum(len(rows[into]) for into, _ in additions) == world_size - 1


def test_a_plain_running_sum_would_not_do() -> None:
    leaves = leaves_of(13)
    assert not torch.equal(torch.stack(leaves).cumsum(0)[-1], tree_sum(leaves))


def _reduce_in_a_process(rank: int, world_size: int, num_leaves: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    leaves = leaves_of(num_leaves)
    for block_elements in (
        4_000_000,
        11,
        4,
        1,
    ):  # of the leaves' 11: in one block, or in the last one 3 or 1
        part = TreeSum(num_leaves)
        for leaf in owned_virtual_shards(num_leaves, rank, world_size):
            part.push((0, leaf), leaves[leaf].clone())
        found = reduce_canonically(part, rank, world_size, block_elements)
        assert torch.equal(found, tree_sum(leaves)), block_elements
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(("world_size", "num_leaves"), [(2, 4), (3, 8), (3, 7)])
def test_processes_with_gloo_agree_with_one_process_to_the_last_bit(
    world_size, num_leaves, tmp_path
) -> None:
    arguments = (world_size, num_leaves, str(tmp_path / "store"))
    mp.start_processes(_reduce_in_a_process, arguments, world_size, start_method="forkserver")
