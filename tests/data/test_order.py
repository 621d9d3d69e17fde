"""The data order: every sample once an epoch, the same at any world size; late starts are free."""

import hashlib
import itertools
from collections import Counter
from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sepdist.data import order
from sepdist.data.order import Blend, Order, owned_virtual_shards, positions_of, units_per_epoch

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=12).map(tuple)


def every_sample(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(shard, number) for shard, size in enumerate(sizes) for number in range(size)]


@given(
    seed=st.integers(0, 2**63),
    sizes=SIZES,
    block_shards=st.integers(1, 5),
    epoch=st.integers(0, 10**9),
)
def test_every_epoch_holds_every_sample_exactly_once(
    seed: int, sizes: tuple[int, ...], block_shards: int, epoch: int
) -> None:
    plan = Order(seed, sizes, block_shards)
    positions = range(epoch * sum(sizes), (epoch + 1) * sum(sizes))
    assert sorted(plan.locate(position) for position in positions) == every_sample(sizes)


@settings(max_examples=200)
@given(
    sizes=SIZES,
    num_virtual_shards=st.integers(1, 9),
    micro_batch=st.integers(1, 4),
    legs=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 7)), min_size=1, max_size=5),
)
def test_a_run_cut_anywhere_and_continued_at_any_world_size_consumes_every_position_once(
    sizes: tuple[int, ...], num_virtual_shards: int, micro_batch: int, legs: list[tuple[int, int]]
) -> None:
    consumed: Counter[int] = Counter()
    located: dict[int, tuple[int, int]] = {}
    step = 0
    for wanted_world, num_steps in legs:
        world_size = min(wanted_world, num_virtual_shards)
        for rank in range(world_size):
            # As in a new process, which knows only the number of the step.
            plan = Order(3, sizes)
            for own_step in range(step, step + num_steps):
                for virtual_shard in owned_virtual_shards(num_virtual_shards, rank, world_size):
                    own = positions_of(own_step, virtual_shard, num_virtual_shards, micro_batch)
                    consumed.update(own)
                    located |= {position: plan.locate(position) for position in own}
        step += num_steps
    total = step * num_virtual_shards * micro_batch
    assert consumed == Counter(range(total))
    plan = Order(3, sizes)
    assert located == {position: plan.locate(position) for position in range(total)}
    visits = Counter(located.values())
    assert all(
        total // sum(sizes) <= visits[sample] <= -(-total // sum(sizes))
        for sample in every_sample(sizes)
    )


@pytest.mark.parametrize("num_virtual_shards", range(1, 17))
def test_ranks_own_the_blocks_that_array_split_makes(num_virtual_shards: int) -> None:
    for world_size in range(1, num_virtual_shards + 1):
        blocks = np.array_split(np.arange(num_virtual_shards), world_size)
        for rank, block in enumerate(blocks):
            owned = owned_virtual_shards(num_virtual_shards, rank, world_size)
            assert list(owned) == block.tolist()


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (0, 5), (0, 0)])
def test_a_rank_that_would_own_nothing_is_refused(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} of {world_size} with 4 virtual shards"):
        owned_virtual_shards(4, rank, world_size)


def test_positions_of_a_step_are_cut_into_virtual_shards_in_order() -> None:
    found = [list(positions_of(5, shard, 3, 2)) for shard in range(3)]
    assert found == [[30, 31], [32, 33], [34, 35]]


def test_a_stretch_of_positions_needs_only_one_block_of_shards() -> None:
    sizes, block_shards = (5,) * 12, 3
    plan = Order(0, sizes, block_shards)
    for epoch in range(3):
        blocks = [
            {plan.locate(position)[0] for position in range(first, first + 15)}
            for first in range(epoch * 60, (epoch + 1) * 60, 15)
        ]
        assert all(len(block) == block_shards for block in blocks)
        assert set.union(*blocks) == set(range(12))


def test_epochs_and_seeds_differ_and_samples_of_a_block_are_mixed() -> None:
    sizes = (20,) * 6

    def epoch(seed: int, number: int) -> list[tuple[int, int]]:
        plan = Order(seed, sizes, block_shards=3)
        return [plan.locate(position) for position in range(number * 120, (number + 1) * 120)]

    orders = [epoch(seed, number) for seed in range(3) for number in range(3)]
    assert len({tuple(one) for one in orders}) == 9
    # Neighbours share a shard by chance only, 1 in 3; the bound is 6 standard deviations above.
    for one in orders:
        assert sum(a[0] == b[0] for a, b in itertools.pairwise(one)) < 40 + 6 * 5.2


def test_each_shard_and_each_sample_of_a_block_comes_first_as_often_as_chance_has_it() -> None:
    counts = Counter(Order(seed, (3, 1, 2), block_shards=2).locate(0) for seed in range(3000))
    # Three equally likely pairs of shards form the first block; any of its 4, 5 or 3 samples leads.
    chances = {0: (1 / 4 + 1 / 5) / 3, 1: (1 / 4 + 1 / 3) / 3, 2: (1 / 5 + 1 / 3) / 3}
    assert set(counts) == set(every_sample((3, 1, 2)))
    for (shard, _), count in counts.items():
        assert abs(count - 3000 * chances[shard]) < 5 * (3000 * chances[shard]) ** 0.5


def test_the_order_is_the_same_in_every_version_of_numpy_and_of_this_package() -> None:
    """From the definition: sort by the raw Philox stream of the derived key; and the values."""

    def permutation(size: int, purpose: str, *numbers: int) -> list[int]:
        text = "\x1f".join(["7", purpose, *map(str, numbers)])
        key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
        raw = np.random.Philox(key=key).random_raw(size).tolist()
        return sorted(range(size), key=lambda i: raw[i])

    sizes = (2, 4, 3, 1)
    shards = permutation(4, "shard order", 1)
    expected = []
    for block, pair in enumerate((shards[:2], shards[2:])):
        flat = [(shard, number) for shard in pair for number in range(sizes[shard])]
        expected += [flat[place] for place in permutation(len(flat), "sample order", 1, block)]
    plan = Order(7, sizes, block_shards=2)
    assert [plan.locate(position) for position in range(10, 20)] == expected
    first = [(1, 3), (1, 2), (1, 0), (0, 0), (0, 1), (1, 1)]
    assert expected == [*first, (2, 2), (2, 1), (2, 0), (3, 0)]


@pytest.mark.parametrize("step", [1, 10**6, 10**12])
def test_a_late_start_takes_as_many_operations_as_an_early_one(
    step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int | str, ...]] = []
    derive = order.rng
    monkeypatch.setattr(
        order, "rng", lambda *arguments: drawn.append(arguments) or derive(*arguments)
    )
    plan = Order(0, (50,) * 40)
    for virtual_shard in range(4):
        for position in positions_of(step, virtual_shard, 4, 8):
            plan.locate(position)
    # 32 positions lie in at most two blocks of 400, these in at most two epochs.
    assert 2 <= len(drawn) <= 4
    drawn.clear()
    for position in positions_of(step, 0, 4, 8):
        plan.locate(position)
    assert drawn == []


@given(
    sizes=SIZES,
    block_shards=st.integers(1, 4),
    start=st.integers(0, 200),
    length=st.integers(1, 40),
)
def test_upcoming_names_what_is_needed_in_order_of_first_need_and_looks_one_block_ahead(
    sizes: tuple[int, ...], block_shards: int, start: int, length: int
) -> None:
    plan = Order(1, sizes, block_shards)
    positions = range(start, start + length)
    upcoming = plan.upcoming(positions)
    needed = list(dict.fromkeys(plan.locate(position)[0] for position in positions))
    assert upcoming[: len(needed)] == needed
    assert len(upcoming) == len(set(upcoming)) <= len(sizes)
    num_blocks = -(-len(sizes) // block_shards)
    if num_blocks > 2 and length == 1 and start % sum(sizes) == 0:
        assert len(upcoming) >= 2 * block_shards  # the first block and the next one


@pytest.mark.parametrize("sizes", [(), (3, 0)])
def test_an_order_over_nothing_is_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="no order over shards"):
        Order(0, sizes)


def test_a_negative_position_is_refused() -> None:
    with pytest.raises(ValueError, match="position -1: positions count from 0"):
        Order(0, (3,)).locate(-1)


# Several data sets.


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**63),
    sets=st.lists(st.tuples(SIZES, st.none() | st.floats(0.1, 3)), min_size=1, max_size=4),
    num_virtual_shards=st.integers(1, 6),
    micro_batch=st.integers(1, 4),
    legs=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=4),
)
def test_every_set_of_a_blend_is_read_in_its_own_order_without_gaps_at_any_world_size_and_cut(
    seed: int,
    sets: list[tuple[tuple[int, ...], float | None]],
    num_virtual_shards: int,
    micro_batch: int,
    legs: list[tuple[int, int]],
) -> None:
    sizes = [shard_sizes for shard_sizes, _ in sets]
    units = units_per_epoch(
        [sum(one) for one in sizes], [weight for _, weight in sets], micro_batch
    )
    consumed: dict[int, tuple[int, int]] = {}
    step = 0
    for wanted_world, num_steps in legs:
        world_size = min(wanted_world, num_virtual_shards)
        for rank in range(world_size):
            # As in a new process, which knows only the number of the step.
            blend = Blend(seed, units, micro_batch)
            for own_step in range(step, step + num_steps):
                for virtual_shard in owned_virtual_shards(num_virtual_shards, rank, world_size):
                    positions = positions_of(
                        own_step, virtual_shard, num_virtual_shards, micro_batch
                    )
                    located = [blend.locate(position) for position in positions]
                    assert len({number for number, _ in located}) == 1, "a batch is of one data set"
                    assert not consumed.keys() & set(positions)
                    consumed |= dict(zip(positions, located, strict=True))
        step += num_steps
    total = step * num_virtual_shards * micro_batch
    assert sorted(consumed) == list(range(total))
    per_epoch = sum(units) * micro_batch
    for number, shard_sizes in enumerate(sizes):
        own = [
            consumed[position][1] for position in range(total) if consumed[position][0] == number
        ]
        assert own == list(range(len(own))), (
            "each set goes through its positions one by one, in the order of training"
        )
        plan, size = Order(seed, shard_sizes), sum(shard_sizes)
        visits = Counter(plan.locate(position) for position in own)
        assert all(
            len(own) // size <= visits[sample] <= -(-len(own) // size)
            for sample in every_sample(shard_sizes)
        )
        for first in range(0, total - per_epoch + 1, per_epoch):
            here = [consumed[position][0] for position in range(first, first + per_epoch)]
            assert here.count(number) == units[number] * micro_batch
        passed = [
            Blend(seed, units, micro_batch).passed(position, number)
            for position in range(0, total + 1, 7)
        ]
        assert passed == [
            sum(consumed[one][0] == number for one in range(position))
            for position in range(0, total + 1, 7)
        ]


def test_an_epoch_holds_one_pass_of_each_set_or_its_weight_times_the_batches_of_the_first() -> None:
    # Paper 1: 21 % and 79 %.
    assert units_per_epoch([13900, 50800], [None, None], 6) == (2317, 8467)
    assert units_per_epoch([100, 50800, 3], [None, 0.5, 2.0], 10) == (10, 5, 20)
    assert units_per_epoch([1, 1], [None, 0.001], 8) == (1, 1)


def test_one_data_set_alone_keeps_its_positions() -> None:
    blend = Blend(9, (5,), 3)
    for position in range(40):
        assert blend.locate(position) == (0, position)


def test_a_blend_is_the_same_in_every_version_of_numpy_and_of_this_package() -> None:
    """From the definition: the sets of an epoch's units, sorted by the raw Philox stream."""
    units, epoch = (3, 4, 1), 2
    text = "\x1f".join(["7", "data set order", str(epoch)])
    key = hashlib.blake2b(text.encode(), digest_size=16).digest()
    raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(8).tolist()
    sets = [0, 0, 0, 1, 1, 1, 1, 2]
    expected = [sets[i] for i in sorted(range(8), key=lambda i: raw[i])]
    blend = Blend(7, units, 2)
    found = [blend.locate(position) for position in range(epoch * 16, (epoch + 1) * 16, 2)]
    assert [number for number, _ in found] == expected == [0, 1, 1, 1, 1, 0, 0, 2]
    assert found[0] == (0, epoch * 3 * 2) and found[-1] == (2, epoch * 1 * 2)


@given(
    units=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    micro_batch=st.integers(1, 3),
    window=st.integers(1, 100),
    first=st.integers(0, 300),
)
def test_any_units_in_a_row_of_an_even_blend_of_two_sets_hold_their_shares_rounded_down_or_up(
    units: tuple[int, int], micro_batch: int, window: int, first: int
) -> None:
    blend = Blend(0, units, micro_batch, "even")
    numbers = [blend.locate(unit * micro_batch)[0] for unit in range(first, first + window)]
    for number in (0, 1):
        exactly = Fraction(window * units[number], sum(units))
        assert floor(exactly) <= numbers.count(number) <= ceil(exactly)


@given(
    units=st.lists(st.integers(1, 30), min_size=2, max_size=5).map(tuple),
    epoch=st.integers(0, 10**6),
)
def test_an_even_blend_of_any_sets_has_an_epochs_units_and_every_set_in_its_own_order(
    units: tuple[int, ...], epoch: int
) -> None:
    blend, size = Blend(3, units, 2, "even"), 2 * sum(units)
    located = [blend.locate(position) for position in range(epoch * size, (epoch + 1) * size)]
    for number, count in enumerate(units):
        own = [position for set_number, position in located if set_number == number]
        assert own == list(range(2 * count * epoch, 2 * count * (epoch + 1))), (
            "nothing lost, nothing repeated"
        )
        for end in range(size + 1):
            passed = blend.passed(epoch * size + end, number)
            assert passed == 2 * count * epoch + sum(one == number for one, _ in located[:end])


def test_an_even_blend_is_a_straight_line_on_a_grid_and_ignores_the_seed() -> None:
    def row(units: tuple[int, ...], seed: int = 0) -> str:
        blend = Blend(seed, units, 1, "even")
        return "".join(str(blend.locate(position)[0]) for position in range(sum(units)))

    assert row((5, 5)) == "0101010101"
    assert row((1, 9)) == "1111011111"
    assert row((3, 7)) == row((3, 7), seed=8) == "1011011101"
    assert row((4, 6)) == "1010110101"
    assert row((2, 4, 6)) == "210212210212"


@pytest.mark.parametrize(("units", "interleave"), [((3, 0), "drawn"), ((3, 1), "odd")])
def test_a_blend_of_nothing_or_in_no_known_way_is_refused(
    units: tuple[int, ...], interleave: str
) -> None:
    with pytest.raises(ValueError, match="no blend of"):
        Blend(0, units, 2, interleave)
