"""Kill anything, and the run goes on to the same bits: each test disturbs a run and compares it with one left alone.

The run left alone is a single process without Ray, so the two share neither the launcher nor the world size.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from sepdist.reporting import read_metrics
from sepdist.training.checkpoint import find_committed
from tests.disturb import Nodes, Run, left_alone
from tests.runs import TINY, final_hash, history

QUICK_STEPS, SLOW_STEPS = 40, 300
OFTEN = [*TINY, "validation.every_steps=40", "training.checkpoint_every=5", "validation.num_listening=0"]


@pytest.fixture(scope="module")
def undisturbed(tiny_data, tmp_path_factory) -> tuple[dict[int, float], str]:
    return left_alone(tiny_data, tmp_path_factory.mktemp("alone"), SLOW_STEPS, OFTEN)


@pytest.fixture
def started() -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start(*arguments, **options) -> Run:
        runs.append(Run(*arguments, **({"settings": OFTEN, "steps": SLOW_STEPS} | options)))
        return runs[-1]

    yield start
    for run in runs:
        run.end()


def same(run: Run, undisturbed: tuple[dict[int, float], str]) -> None:
    losses, weights = undisturbed
    assert history(run.run_dir) == losses
    assert final_hash(run.run_dir) == weights
    steps = [row["step"] for row in read_metrics(str(run.run_dir)) if "loss/total" in row]
    assert steps == sorted(set(steps)), "a step is there twice"


def told(run: Run) -> list[tuple[str, int]]:
    return [(event["event"], event["workers"]) for event in run.events()]


def test_a_run_that_lost_a_worker_of_two_ends_with_the_bits_of_one_left_alone(tiny_data, tmp_path, started) -> None:
    run = started(tiny_data, tmp_path / "run", "cluster.num_workers=2", steps=QUICK_STEPS)
    alone = left_alone(tiny_data, tmp_path / "alone", QUICK_STEPS, OFTEN)
    run.until_step(12)
    seconds = run.seconds_to_next_step(lambda: os.kill(run.workers()[1].pid, signal.SIGKILL))
    run.finish()
    same(run, alone)
    assert told(run) == [("started", 2), ("failed", 2), ("started", 2), ("finished", 2)]
    assert run.events()[1]["error"]
    print(f"worker killed -> next step: {seconds:.1f} s")
    assert seconds < 40


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_stopped_worker_is_taken_for_hung_and_replaced(
    num_workers, undisturbed, tiny_data, tmp_path, started
) -> None:
    run = started(tiny_data, tmp_path / "run", f"cluster.num_workers={num_workers}")
    run.until_step(12)
    seconds = run.seconds_to_next_step(lambda: os.kill(run.workers()[-1].pid, signal.SIGSTOP))
    print(f"one of {num_workers} workers stopped -> next step: {seconds:.1f} s")
    run.finish()
    same(run, undisturbed)
    assert told(run) == [(event, num_workers) for event in ("started", "failed", "started", "finished")]
    assert seconds < 75


@pytest.mark.slow
def test_a_killed_driver_started_again_goes_on_and_its_old_workers_are_gone(
    undisturbed, tiny_data, tmp_path, started
) -> None:
    run = started(tiny_data, tmp_path / "run", "cluster.num_workers=2")
    run.until_step(32)
    left = run.family()
    workers = run.workers()
    began = time.monotonic()
    run.driver.kill()
    run.driver.wait(10)
    gone = psutil.wait_procs(workers, timeout=60)
    print(f"driver killed -> its workers gone: {time.monotonic() - began:.1f} s")
    assert not gone[1]
    assert run.step() >= 32
    run.start()
    began = time.monotonic()
    before = run.attempt()
    run.until(lambda: run.attempt() != before, "started again")
    assert run.step() >= 30, "it began anew"
    print(f"started again -> loop: {time.monotonic() - began:.1f} s")
    run.finish()
    same(run, undisturbed)
    assert told(run) == [("started", 2), ("started", 2), ("finished", 2)]
    assert not psutil.wait_procs(left, timeout=5)[1]


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    yield nodes
    nodes.end()


@pytest.mark.slow
def test_an_elastic_run_survives_the_loss_of_a_node_and_uses_one_that_joins(
    nodes, undisturbed, tiny_data, tmp_path, started
) -> None:
    elastic = ["cluster.num_workers=[1,2]", "cluster.elastic_check_seconds=5", nodes.address]
    run = started(tiny_data, tmp_path / "run", *elastic)
    run.until_step(12)
    assert told(run) == [("started", 2)]
    seconds = run.seconds_to_next_step(nodes.lose_second)
    print(f"node lost -> next step: {seconds:.1f} s")
    assert told(run)[-1] == ("started", 1)
    joined = run.seconds_to_next_step(nodes.join)
    print(f"node joined -> step with it: {joined:.1f} s")
    assert told(run)[-1] == ("started", 2)
    run.finish()
    same(run, undisturbed)
    assert [event for event, _ in told(run)].count("failed") <= 2, run.events()
    assert seconds < 60 and joined < 90


@pytest.mark.slow
def test_a_preemption_notice_makes_a_checkpoint_and_the_run_goes_on_from_it(
    nodes, undisturbed, tiny_data, tmp_path, started
) -> None:
    """No other checkpoint is due in this run, so what it goes on from is the one of the notice."""
    seldom = ["training.checkpoint_every=100000", "validation.every_steps=100000"]
    elastic = ["cluster.num_workers=[1,2]", "cluster.elastic_check_seconds=600", "cluster.preemption_check_steps=5"]
    run = started(tiny_data, tmp_path / "run", *seldom, *elastic, nodes.address)
    run.until_step(12)
    assert not committed_steps(run)
    began = time.monotonic()
    nodes.drain_second(15)
    steps = run.until(lambda: committed_steps(run), "committed")
    print(f"notice -> checkpoint committed: {time.monotonic() - began:.1f} s")
    assert len(steps) == 1 and steps[0] % 5 == 0
    time.sleep(max(0.0, 15 - (time.monotonic() - began)))
    seconds = run.seconds_to_next_step(nodes.lose_second)
    print(f"node taken away -> next step: {seconds:.1f} s")
    assert "resuming from" in run.log.read_text() or run.step() > steps[0]
    run.finish()
    same_losses, weights = undisturbed
    assert history(run.run_dir) == same_losses
    assert final_hash(run.run_dir) == weights
    assert told(run)[0] == ("started", 2) and told(run)[-2:] == [("started", 1), ("finished", 1)]
    assert any("preempt" in event.get("error", "") for event in run.events())


def committed_steps(run: Run) -> list[int]:
    return [one.step for one in find_committed(str(run.run_dir / "checkpoints"))]
