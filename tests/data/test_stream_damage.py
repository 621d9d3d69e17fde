"""A damaged sample ends a stream or is replaced, the same in every world, and is counted."""

from pathlib import Path

import pytest

from sepdist.data.dataset import Dataset
from sepdist.data.members import DataError
from sepdist.data.shards import read_index, read_manifest
from tests.support import toy
from tests.support.streams import open_stream, rows, take


def damaged_set(
    tmp_path: Path, numbers: tuple[int, ...], sizes: tuple[int, ...] = (6, 6)
) -> dict[int, int]:
    """Write a data set and damage s2 of mixtures `numbers`; returns the members' byte offsets."""
    toy.write(tmp_path, sizes)
    offsets = {}
    first = 1
    for shard in read_manifest(tmp_path).shards:
        for i, sample in enumerate(read_index(tmp_path, shard)):
            if first + i in numbers:
                offsets[first + i] = toy.damage(tmp_path / shard.name, sample, "s2")
        first += shard.num_samples
    return offsets


def test_a_damaged_sample_ends_the_run_and_is_named_with_shard_key_and_byte_offset(
    tmp_path: Path,
) -> None:
    offset = damaged_set(tmp_path, (8,))[8]
    healthy = tmp_path / "healthy"
    toy.write(healthy, (6, 6))
    met = next(
        step
        for step, batches in enumerate(take(Dataset(str(healthy)), 0, 3))
        if any("mix-8" in batch.ids for batch in batches)
    )
    for world_size in (1, 3):
        outcomes = []
        for rank in range(world_size):
            stream = open_stream(Dataset(str(tmp_path)), rank=rank, world_size=world_size)
            steps = stream.steps(0)
            for _ in range(met):
                next(steps)  # earlier steps are delivered, however far the threads are ahead
            try:
                next(steps)
                outcomes.append("")
            except DataError as error:
                outcomes.append(str(error))
            stream.close()
        messages = [one for one in outcomes if one]
        # Of the rank that owns the position; where epochs meet in a step, possibly of two.
        assert messages
        for message in messages:
            assert f"toy-train-000001.tar, mix-8.s2 at byte {offset}: damaged" in message
            assert str(tmp_path) in message and "position " in message
            assert "data.max_damaged=0 are allowed" in message


@pytest.mark.parametrize("order", [1, 2])
def test_a_damaged_sample_is_replaced_by_the_next_position_the_same_in_every_world_and_counted(
    order: int, tmp_path: Path
) -> None:
    """Next in the order of the data set, or in the lane: positions of the same virtual shard."""
    broken = (2, 8, 9)
    damaged_set(tmp_path / "broken", broken)
    toy.write(tmp_path / "healthy", (6, 6))
    undamaged = take(Dataset(str(tmp_path / "healthy")), 0, 12, order=order)  # 8 epochs
    healthy = [id_ for _, id_, _ in rows(undamaged)]
    by_world = []
    for world_size in (1, 2, 3):
        delivered: list[tuple[int, str, bytes]] = []
        replaced = 0
        for rank in range(world_size):
            dataset = Dataset(str(tmp_path / "broken"))
            how = {"rank": rank, "world_size": world_size, "order": order}
            stream = open_stream(dataset, max_damaged=3, **how)
            steps = stream.steps(0)
            delivered += rows([next(steps) for _ in range(8)])
            replaced = max(replaced, stream.num_damaged)
            stream.close()
        assert 1 <= replaced <= 3
        by_world.append(sorted(delivered))
    assert by_world[0] == by_world[1] == by_world[2]
    assert [position for position, _, _ in by_world[0]] == list(range(64))
    bad = {f"mix-{number}" for number in broken}
    for position, id_, _ in by_world[0]:
        later = range(position, len(healthy))
        if order == 2:
            later = [one for one in later if one // 2 % 4 == position // 2 % 4]
        assert id_ == next(healthy[one] for one in later if healthy[one] not in bad)


def test_one_damaged_sample_more_than_allowed_ends_the_run(tmp_path: Path) -> None:
    damaged_set(tmp_path, (2, 8, 9))
    stream = open_stream(Dataset(str(tmp_path)), max_damaged=2)
    steps = stream.steps(0)
    with pytest.raises(DataError, match=r"3 damaged samples, data\.max_damaged=2 are allowed"):
        for _ in range(9):
            next(steps)
    assert stream.num_damaged == 3
    stream.close()


def test_a_data_set_of_nothing_but_damage_is_an_error_and_not_an_endless_search(
    tmp_path: Path,
) -> None:
    damaged_set(tmp_path, (1, 2), sizes=(2,))
    stream = open_stream(Dataset(str(tmp_path)), max_damaged=5)
    with pytest.raises(DataError, match=r"[2-9] damaged samples in a row"):
        next(stream.steps(0))
    stream.close()


def test_a_missing_shard_is_never_replaced(tmp_path: Path) -> None:
    toy.write(tmp_path, (3, 3))
    (tmp_path / "toy-train-000001.tar").unlink()
    stream = open_stream(Dataset(str(tmp_path)), max_damaged=100)
    with pytest.raises(DataError, match=r"toy-train-000001\.tar: the shard is missing"):
        next(stream.steps(0))
    stream.close()
