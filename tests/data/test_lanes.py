"""Order 2: every virtual shard reads a lane of its own, and a rank no other lanes' shards."""

import hashlib
import itertools
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sepdist.data import order
from sepdist.data.order import INTERLEAVES, Blend, Order, owned_virtual_shards, units_per_epoch

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=12).map(tuple)
WEIGHTS = st.none() | st.floats(0.1, 3)
Sizes = tuple[int, ...]


def one_set(sizes: Sizes, num_lanes: int, micro_batch: int, block_shards: int = 2) -> Order:
    return Order(3, sizes, block_shards, Blend(0, (1,), micro_batch, num_lanes=num_lanes))


def of_lane(position: int, num_lanes: int, micro_batch: int) -> int:
    return position // micro_batch % num_lanes


def every_sample(sizes: Sizes) -> list[tuple[int, int]]:
    return [(shard, number) for shard, size in enumerate(sizes) for number in range(size)]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**63),
    sets=st.lists(st.tuples(SIZES, WEIGHTS), min_size=1, max_size=3),
    num_lanes=st.integers(1, 14),
    micro_batch=st.integers(1, 11),
    interleave=st.sampled_from(INTERLEAVES),
)
def test_every_set_of_a_blend_has_every_sample_once_an_epoch_in_the_lanes_of_its_batches(
    seed: int,
    sets: list[tuple[Sizes, float | None]],
    num_lanes: int,
    micro_batch: int,
    interleave: str,
) -> None:
    """Also of uneven shards, more lanes than shards, and batches longer than a lane."""
    sizes, totals = [one for one, _ in sets], [sum(one) for one, _ in sets]
    units = units_per_epoch(totals, [None, *(w for _, w in sets[1:])], micro_batch, num_lanes)
    blend = Blend(seed, units, micro_batch, interleave, num_lanes)
    orders = [Order(seed, one, 2, blend, number) for number, one in enumerate(sizes)]
    seen: list[list[tuple[int, int]]] = [[] for _ in sets]
    places = [Counter[int]() for _ in sets]
    per_epoch = sum(blend.units) * micro_batch
    for position in range(max(2 * sum(totals), per_epoch)):
        number, own = blend.locate(position)
        assert own == blend.passed(position, number) == len(seen[number])
        lane, before = blend.lanes(number, own)
        assert lane == of_lane(position, num_lanes, micro_batch)
        assert before.tolist() == [places[number][one] for one in range(num_lanes)]
        places[number][lane] += 1
        seen[number].append(orders[number].locate(own))
        if position + 1 == per_epoch:
            assert [len(one) for one in seen] == [n * micro_batch for n in blend.units]
    for one, total, found in zip(sizes, totals, seen, strict=True):
        for first in range(0, len(found) - total + 1, total):
            assert sorted(found[first : first + total]) == every_sample(one)


@settings(max_examples=60)
@given(
    sizes=SIZES,
    num_lanes=st.integers(1, 14),
    micro_batch=st.integers(1, 11),
    world_size=st.integers(1, 14),
    epoch=st.integers(0, 10**6),
)
def test_a_rank_reads_its_lanes_which_are_equal_and_shares_a_shard_at_each_edge_at_most(
    sizes: Sizes, num_lanes: int, micro_batch: int, world_size: int, epoch: int
) -> None:
    world_size = min(world_size, num_lanes)
    plan, total = one_set(sizes, num_lanes, micro_batch), sum(sizes)
    lanes = defaultdict[int, list[int]](list)
    for position in range(epoch * total, (epoch + 1) * total):
        lanes[of_lane(position, num_lanes, micro_batch)].append(plan.locate(position)[0])
    lengths = [len(lanes[lane]) for lane in range(num_lanes)]
    assert max(lengths) - min(lengths) <= micro_batch
    # The shards lie in a row that is cut between the ranks, so a cut adds at most one shard to
    # read, whatever the order of the row.
    ranks = []
    for rank in range(world_size):
        owned = owned_virtual_shards(num_lanes, rank, world_size)
        ranks.append({shard for lane in owned for shard in lanes[lane]})
    assert sum(map(len, ranks)) <= len(sizes) + world_size - 1
    for rank, other in itertools.combinations(range(world_size), 2):
        assert len(ranks[rank] & ranks[other]) <= 1
    samples = Counter(shard for lane in lanes.values() for shard in lane)
    for own in ranks:
        inner = [shard for shard in own if sum(shard in other for other in ranks) == 1]
        assert len(own) - len(inner) <= 2 and all(samples[one] == sizes[one] for one in inner)


@settings(max_examples=100)
@given(
    sizes=SIZES,
    num_lanes=st.integers(1, 6),
    micro_batch=st.integers(1, 5),
    step=st.integers(0, 60),
    num_steps=st.integers(1, 6),
    owned=st.tuples(st.integers(0, 5), st.integers(1, 6)),
)
def test_upcoming_names_what_the_lanes_of_a_rank_use_next_in_order_and_one_block_more(
    sizes: Sizes,
    num_lanes: int,
    micro_batch: int,
    step: int,
    num_steps: int,
    owned: tuple[int, int],
) -> None:
    plan, size = one_set(sizes, num_lanes, micro_batch), num_lanes * micro_batch
    first, stop = owned[0] % num_lanes, min(num_lanes, owned[0] % num_lanes + owned[1])
    upcoming = plan.upcoming(range(step * size, (step + num_steps) * size), range(first, stop))
    assert len(upcoming) == len(set(upcoming))
    used: dict[int, tuple[int, int]] = {}  # shard -> when its first sample is read
    for at in range(step, step + num_steps):
        for lane in range(first, stop):
            for i in range(micro_batch):
                shard = plan.locate((at * num_lanes + lane) * micro_batch + i)[0]
                used[shard] = min(used.get(shard, (at, i)), (at, i))
    assert used.keys() <= set(upcoming)
    if len(upcoming) < len(sizes):  # of all shards only the first epoch is looked at
        order_of_use = [used[shard] for shard in upcoming if shard in used]
        assert order_of_use == sorted(order_of_use)
    # What else is announced comes soon: in the rest of these blocks of two shards or in the next.
    most = (stop - first) * (len(used) + 2 * 2 + 2)
    assert len(upcoming) <= most


def test_an_announced_set_of_shards_is_a_small_part_of_a_large_data_set() -> None:
    plan = Order(0, (7,) * 6400, blend=Blend(0, (1,), 1, num_lanes=64))
    per_lane = 6400 / 64
    read, step = set[int](), 0
    for step in range(0, 700, 5):
        upcoming = plan.upcoming(range(step * 64, (step + 5) * 64), range(20, 21))
        assert len(upcoming) <= 3 * plan.block_shards, "the block, the next, and an edge"
        if step < 600:  # before the first block of the next epoch
            read |= set(upcoming)
    assert per_lane - 2 * plan.block_shards <= len(read) <= per_lane + 2


def permutation(size: int, seed: int, purpose: str, *numbers: int) -> list[int]:
    text = "\x1f".join([str(seed), purpose, *map(str, numbers)])
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    raw = np.random.Philox(key=key).random_raw(size).tolist()
    return sorted(range(size), key=lambda i: raw[i])


def test_the_lanes_are_the_same_in_every_version_of_numpy_and_of_this_package() -> None:
    """From the definition: shards in a row, cut into lanes, each permuted in blocks of two shards.

    Epoch 1 of 12 samples in 3 lanes of batches of 2: positions 12 to 23, 4 in each lane.
    """
    sizes = (2, 4, 1, 1, 4)
    shards = permutation(5, 7, "shard order", 1)
    row = [(shard, number) for shard in shards for number in range(sizes[shard])]
    expected, block = [], 0
    for lane in (row[:4], row[4:8], row[8:]):
        here: list[tuple[int, int]] = []
        own = list(dict.fromkeys(shard for shard, _ in lane))
        for first in range(0, len(own), 2):
            samples = [one for one in lane if one[0] in own[first : first + 2]]
            places = permutation(len(samples), 7, "sample order", 1, block)
            here += [samples[place] for place in places]
            block += 1
        expected.append(here)
    plan = Order(7, sizes, 2, Blend(0, (1,), 2, num_lanes=3))
    found: dict[int, list[tuple[int, int]]] = {0: [], 1: [], 2: []}
    for position in range(12, 24):
        found[position // 2 % 3].append(plan.locate(position))
    assert list(found.values()) == expected
    assert expected[0] == [(1, 3), (1, 2), (1, 0), (1, 1)]
    assert expected[1] == [(2, 0), (0, 1), (0, 0), (3, 0)]


def test_a_drawn_blend_permutes_the_units_of_each_lane_by_the_raw_stream() -> None:
    text = "\x1f".join(["7", "data set order", "2"])
    key = hashlib.blake2b(text.encode(), digest_size=16).digest()
    raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(8).tolist()
    dealt = {0: [0, 0, 0, 1], 1: [0, 0, 1, 1]}  # 0 0 | 0 0 | 0 1 | 1 1
    blend = Blend(7, (5, 3), 2, num_lanes=2)
    for lane in range(2):
        keys = raw[lane::2]
        expected = [dealt[lane][i] for i in sorted(range(4), key=lambda i: keys[i])]
        positions = range(2 * 16 + 2 * lane, 3 * 16, 4)
        assert [blend.locate(position)[0] for position in positions] == expected


@settings(max_examples=200)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    weights=st.lists(WEIGHTS, min_size=3, max_size=3),
    micro_batch=st.integers(1, 8),
    num_lanes=st.integers(2, 16),
)
def test_an_epoch_is_a_whole_number_of_steps_with_each_sets_share_to_a_unit(
    sizes: list[int], weights: list[float | None], micro_batch: int, num_lanes: int
) -> None:
    weights = [None, *weights[: len(sizes) - 1]]
    units = units_per_epoch(sizes, weights, micro_batch, num_lanes)
    assert sum(units) % num_lanes == 0 and min(units) >= 1
    first = max(1, round(sizes[0] / micro_batch))
    wanted = [Fraction(first)] + [
        Fraction(size, micro_batch) if weight is None else Fraction(weight) * first
        for size, weight in zip(sizes[1:], weights[1:], strict=True)
    ]
    scale = sum(units) / sum(wanted)
    if all(one * scale >= 1 for one in wanted):
        assert all(
            abs(unit - one * scale) < 1 + 1e-9 for unit, one in zip(units, wanted, strict=True)
        )


@settings(max_examples=60)
@given(
    size=st.integers(1, 200),
    labelled=st.integers(1, 7),
    num_lanes=st.just(8),
    micro_batch=st.integers(1, 4),
)
def test_evenly_interleaved_whole_shares_give_every_step_the_same_number_of_each_set(
    size: int, labelled: int, num_lanes: int, micro_batch: int
) -> None:
    weight = (num_lanes - labelled) / labelled
    units = units_per_epoch([size, 50], [None, weight], micro_batch, num_lanes)
    blend = Blend(0, units, micro_batch, "even", num_lanes)
    for step in range(2 * sum(units) // num_lanes + 1):
        first = step * num_lanes
        row = [blend.locate((first + lane) * micro_batch)[0] for lane in range(num_lanes)]
        assert row.count(0) == labelled


@given(
    sizes=SIZES,
    num_lanes=st.integers(1, 9),
    micro_batch=st.integers(1, 4),
    position=st.integers(0, 300),
)
def test_a_sample_gives_way_to_the_next_of_its_lane_and_in_the_end_to_any(
    sizes: Sizes, num_lanes: int, micro_batch: int, position: int
) -> None:
    plan, total = one_set(sizes, num_lanes, micro_batch), sum(sizes)
    found = list(plan.candidates(position))
    lane, epoch = of_lane(position, num_lanes, micro_batch), position // total
    own = [
        plan.locate(one)
        for one in range(position, (epoch + 2) * total)
        if of_lane(one, num_lanes, micro_batch) == lane
    ]
    assert found[: len(own)] == own and found[0] == plan.locate(position)
    assert sorted(found[len(own) :]) == every_sample(sizes)


@pytest.mark.parametrize("step", [1, 10**9])
def test_ten_million_samples_for_a_thousand_ranks_are_a_few_draws_away(
    step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int | str, ...]] = []
    derive = order.rng
    monkeypatch.setattr(
        order, "rng", lambda *arguments: drawn.append(arguments) or derive(*arguments)
    )
    plan = Order(0, (100,) * 100_000, blend=Blend(0, (1,), 4, num_lanes=1024))
    first = (step * 1024 + 17) * 4
    shards = {plan.locate(position)[0] for position in range(first, first + 4)}
    # One epoch or two, with a block each.
    assert len(drawn) <= 4 and len(shards) <= 4
    drawn.clear()
    upcoming = plan.upcoming(range(step * 4096, (step + 5) * 4096), range(17, 18))
    assert len(drawn) <= 3, "the next block, perhaps in another epoch"
    assert shards <= set(upcoming) and len(upcoming) <= 10


def test_lanes_of_unequal_numbers_of_units_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no blend of .* in 3 lanes"):
        Blend(0, (2, 3), 2, num_lanes=3)
