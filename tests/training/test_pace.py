"""A checkpoint is due after a fixed number of steps, or by Young's formula from measured costs."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sepdist.config import TrainingConfig
from sepdist.training import pace
from sepdist.training.pace import Pace
from sepdist.training.world import World

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


class Clock:
    """Stands in for `time`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(pace.time, "monotonic", lambda: self.now)


def drive(
    one: Pace, clock: Clock, steps: range, step_seconds: float, costs: list[float]
) -> list[int]:
    """Run steps with checkpoints of `costs` in turn; returns those after which one was due."""
    due, costs = [], list(costs)
    for step in steps:
        clock.now += step_seconds
        if one.due(step + 1):
            with one.saving(step + 1):
                clock.now += costs.pop(0) if len(costs) > 1 else costs[0]
            due.append(step + 1)
    return due


def test_a_number_of_steps_means_its_multiples_whatever_checkpoints_cost(monkeypatch) -> None:
    one = Pace(TrainingConfig(checkpoint_every=30), 45, ALONE)
    assert drive(one, Clock(monkeypatch), range(45, 160), 1.0, [500.0]) == [60, 90, 120, 150]


def test_auto_takes_the_interval_of_young_after_its_first_checkpoint(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    world = World(0, 512, CPU)
    monkeypatch.setattr(pace, "broadcast_object", lambda value, world: value)
    one = Pace(TrainingConfig(checkpoint_every="auto", worker_mtbf_hours=50_000), 7, world)
    due = drive(one, clock, range(7, 5000), 0.8, [2.0])
    young = math.sqrt(2 * 2.0 * 50_000 * 3600 / 512)  # 1186 s
    assert due[0] == 107 and len(due) > 3
    assert {after - before for before, after in itertools.pairwise(due)} == {round(young / 0.8)}


def test_auto_goes_by_the_mean_cost_and_step_of_the_attempt(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    one = Pace(TrainingConfig(checkpoint_every="auto", worker_mtbf_hours=10.0), 0, ALONE)
    first, second, third = drive(one, clock, range(1200), 1.0, [4.0, 1.0])[:3]
    assert first == 100 and second - first == round(math.sqrt(2 * 4.0 * 36_000))
    assert third - second == round(math.sqrt(2 * 2.5 * 36_000))


@pytest.mark.parametrize(("step_seconds", "cost", "steps"), [(7.0, 1e5, 514), (900.0, 0.001, 1)])
def test_auto_waits_an_hour_at_most_and_a_step_at_least(
    step_seconds: float, cost: float, steps: int, monkeypatch
) -> None:
    clock = Clock(monkeypatch)
    hours = 50_000.0 if steps > 1 else 0.01
    one = Pace(TrainingConfig(checkpoint_every="auto", worker_mtbf_hours=hours), 0, ALONE)
    due = drive(one, clock, range(700), step_seconds, [cost])
    assert due[1] - due[0] == steps


def _paced(rank: int, store: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    one = Pace(
        TrainingConfig(checkpoint_every="auto", worker_mtbf_hours=1.0), 0, World(rank, 2, CPU)
    )
    now = 50.0
    pace.time = type("Clock", (), {"monotonic": staticmethod(lambda: now)})  # type: ignore[assignment]
    one._began = 0.0
    with one.saving(100):
        now += 100.0 * (rank + 1)  # each measures something else
    with open(f"{folder}/{rank}", "w") as file:
        file.write(str([step for step in range(100, 4000) if one.due(step)][:1]))
    dist.destroy_process_group()


def test_all_ranks_take_the_interval_of_the_main_rank(tmp_path) -> None:
    arguments = (str(tmp_path / "store"), str(tmp_path))
    mp.start_processes(_paced, arguments, 2, start_method="forkserver")
    first, second = ((tmp_path / str(rank)).read_text() for rank in range(2))
    assert first == second != "[]"
