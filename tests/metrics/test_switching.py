"""The switch rate of tables written by hand, on one worker and on several, and across a restart."""

import json

import torch

from sepdist.metrics.switching import SwitchTracker


def test_the_rate_is_the_share_of_items_whose_permutation_changed() -> None:
    tracker = SwitchTracker()
    tracker.update(["a", "b", "c", "d"], torch.tensor([0, 1, 0, 1]))
    assert tracker.end_epoch() is None
    tracker.update(["d", "c", "b", "a"], [0, 0, 1, 0])
    assert tracker.end_epoch() == 0.25
    tracker.update(["a", "b", "c", "d"], [1, 0, 1, 1])
    assert tracker.end_epoch() == 1.0


def test_items_not_seen_in_both_epochs_do_not_count() -> None:
    tracker = SwitchTracker()
    tracker.update(["a", "b"], [0, 0])
    tracker.end_epoch()
    tracker.update(["b", "c"], [1, 0])
    assert tracker.end_epoch() == 1.0


def test_workers_that_merge_agree_with_one_worker_that_saw_all() -> None:
    ids = [str(i) for i in range(12)]
    epochs = [[i % 2 for i in range(12)], [(i // 2) % 2 for i in range(12)]]
    one, workers = SwitchTracker(), [SwitchTracker() for _ in range(3)]
    for epoch in epochs:
        one.update(ids, epoch)
        expected = one.end_epoch()
        for rank, worker in enumerate(workers):
            worker.update(ids[rank::3][:2], epoch[rank::3][:2])
        states = [worker.state_dict() for worker in workers]
        for worker in workers:  # a merge in the middle of an epoch, as a checkpoint does
            worker.merge(states)
        for rank, worker in enumerate(workers):
            worker.update(ids[rank::3][2:], epoch[rank::3][2:])
        states = [worker.state_dict() for worker in workers]
        for worker in workers:
            worker.merge(states)
        assert [worker.end_epoch() for worker in workers] == [expected] * 3


def test_the_state_survives_json() -> None:
    tracker = SwitchTracker()
    tracker.update(["a", "b"], [0, 1])
    tracker.end_epoch()
    tracker.update(["a"], [1])
    resumed = SwitchTracker()
    resumed.load_state_dict(json.loads(json.dumps(tracker.state_dict())))
    for each in (tracker, resumed):
        each.update(["b"], [1])
        assert each.end_epoch() == 0.5
