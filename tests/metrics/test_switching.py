"""The switch rate of tables written by hand, on one worker and on several, and across a restart."""

import random

import pytest
import torch

from sepdist.metrics.switching import SwitchTracker


def epoch(tracker: SwitchTracker, ids: list[str], ranks, first: int = 0) -> float | None:
    """Note an epoch on one worker, whose positions begin at `first`."""
    tracker.update(ids, ranks, range(first, first + len(ids)))
    tracker.add([tracker.take()])
    return tracker.end_epoch()


def test_the_rate_is_the_share_of_items_whose_permutation_changed() -> None:
    tracker = SwitchTracker()
    assert epoch(tracker, ["a", "b", "c", "d"], torch.tensor([0, 1, 0, 1])) is None
    assert epoch(tracker, ["d", "c", "b", "a"], [0, 0, 1, 0]) == 0.25
    assert epoch(tracker, ["a", "b", "c", "d"], [1, 0, 1, 1]) == 1.0


def test_items_not_seen_in_both_epochs_do_not_count() -> None:
    tracker = SwitchTracker()
    epoch(tracker, ["a", "b"], [0, 0])
    assert epoch(tracker, ["b", "c"], [1, 0]) == 1.0
    assert epoch(tracker, ["a"], [0]) is None
    assert epoch(tracker, [], []) is None


def test_permutations_of_twelve_sources_are_told_apart() -> None:
    last = 479_001_599  # 12! - 1
    tracker = SwitchTracker()
    epoch(tracker, ["a", "b", "c"], [last, last, last])
    assert epoch(tracker, ["a", "b", "c"], [last - 2**16, last, last - 2**8]) == 2 / 3


@pytest.mark.parametrize("num_workers", [1, 2, 3, 7])
def test_any_number_of_workers_gives_the_rates_of_a_plain_table(num_workers: int) -> None:
    """Some ids come twice in an epoch: the one at the later position counts."""
    draw = random.Random(num_workers)
    tracker = SwitchTracker()
    workers = [SwitchTracker() for _ in range(num_workers)]
    before: dict[str, int] = {}
    for number in range(3):
        ids = [f"utt-{draw.randrange(40)}" for _ in range(42)]
        ranks = [draw.randrange(6) for _ in ids]
        now = dict(zip(ids, ranks, strict=True))  # of two, the later
        positions = range(42 * number, 42 * number + 42)
        for first in range(0, 42, 14):  # thrice in an epoch the main rank gathers
            for place in range(first, first + 14):
                one = workers[place % num_workers]
                one.update([ids[place]], [ranks[place]], [positions[place]])
            tracker.add([one.take() for one in workers])
            saved = {name: table.clone() for name, table in tracker.tensors().items()}
            tracker = SwitchTracker()  # as after a restart
            tracker.load(saved)
        both = before.keys() & now.keys()
        changed = sum(before[id_] != now[id_] for id_ in both)
        assert tracker.end_epoch() == (changed / len(both) if both else None)
        assert tracker.previous(ids) == now
        before = now


def test_the_tables_of_older_checkpoints_go_on() -> None:
    tracker = SwitchTracker()
    tracker.load({"previous": {"a": 0, "b": 1, "nobody": 3}, "current": {"a": 1}})
    assert tracker.previous(["a", "b", "c"]) == {"a": 0, "b": 1}
    assert epoch(tracker, ["b"], [1]) == 0.5
    tracker.load({})
    assert epoch(tracker, ["b"], [0]) is None


def test_the_table_takes_16_bytes_for_an_utterance_and_an_epoch() -> None:
    tracker = SwitchTracker()
    for first in (0, 1000):
        epoch(tracker, [f"a-long-name-of-an-utterance-{i}" for i in range(1000)], [1] * 1000, first)
    assert sum(table.nbytes for table in tracker.tensors().values()) == 16_000
