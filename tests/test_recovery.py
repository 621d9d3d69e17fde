"""Kill anything, and the run ends with the same bits as one that was left alone.

The latter is a single process without Ray, so they share neither the launcher nor the world size.
"""

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import psutil
import pytest
import ray.train
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import PreemptionError
from rich.console import Console

from sepdist import composing, config, storage
from sepdist.config import ClusterConfig, ConfigError, TrainConfig
from sepdist.reporting import read_metrics
from sepdist.training import launch
from sepdist.training.checkpoint import find_committed
from sepdist.training.run import freeze
from tests.support.disturb import Nodes, Run, left_alone
from tests.support.runs import TINY, final_hash, frozen, history

pytestmark = pytest.mark.xdist_group(
    "ray"
)  # one after the other: they share two cores and take time

QUICK_STEPS, SLOW_STEPS, ELASTIC_STEPS = 40, 300, 1000
OFTEN = [
    *TINY,
    "validation.every_steps=40",
    "training.checkpoint_every=5",
    "validation.num_listening=0",
]


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


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    yield nodes
    nodes.end()


def same(run: Run, undisturbed: tuple[dict[int, float], str]) -> None:
    losses, weights = undisturbed
    assert history(run.run_dir) == losses
    assert final_hash(run.run_dir) == weights
    steps = [row["step"] for row in read_metrics(str(run.run_dir)) if "loss/total" in row]
    assert steps == sorted(set(steps)), "a step is there twice"


def recorded(run: Run) -> list[tuple[str, int]]:
    return [(event["event"], event["workers"]) for event in run.events()]


@pytest.mark.parametrize(("given", "range_"), [("2", (2, 2)), ("[1,4]", (1, 4)), ("[3,3]", (3, 3))])
def test_the_number_of_workers_is_a_number_or_a_range_also_after_freezing(given, range_) -> None:
    words = ["data.train=a", "data.validation=b", "name=n", "run_dir=r", "training.max_steps=1"]
    words.append(f"cluster.num_workers={given}")
    cfg = config.typed(composing.compose("train", words, TrainConfig), TrainConfig)
    assert config.worker_range(cfg.cluster) == range_
    assert config.worker_range(config.from_yaml(config.to_yaml(cfg), TrainConfig).cluster) == range_


@pytest.mark.parametrize(
    "wrong", [0, -1, True, 1.5, "two", None, [], [1], [2, 1], [0, 2], [1, 2, 3], [1, "x"], {}]
)
def test_any_other_number_of_workers_is_refused_with_what_to_give(wrong) -> None:
    with pytest.raises(ConfigError, match=r"cluster.num_workers=.*\[min, max\]"):
        config.worker_range(ClusterConfig(num_workers=wrong))


def test_an_elastic_run_that_native_reduction_cannot_take_is_refused_before_it_starts(
    tiny_data, tmp_path
) -> None:
    path = frozen(tiny_data, tmp_path / "run", "training.max_steps=1", "engine.reduction=native")
    cfg = config.load_frozen(path)
    for fits in ([1, 2], 4):
        cfg.cluster.num_workers = fits
        freeze(cfg, Console(quiet=True))
    cfg.cluster.num_workers = [1, 4]
    with pytest.raises(ConfigError, match=r"native needs a world size that divides .*, not 3"):
        freeze(cfg, Console(quiet=True))


def test_a_notice_is_acted_on_once_and_a_second_one_again(monkeypatch) -> None:
    """Ray goes on answering with the same notice until the workers end."""
    one, two = {"node a": [0]}, {"node a": [0], "node b": [1]}
    answers = iter([None, one, one, two, two])
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: next(answers))
    preempted = launch.preemption_notice()
    assert [preempted() for _ in range(5)] == [False, True, False, True, False]


def failed(text: str) -> ray.train.WorkerGroupError:
    return ray.train.WorkerGroupError(text, {0: ValueError(text)})


def test_failures_in_a_row_end_a_run_and_a_checkpoint_between_them_starts_the_count_afresh(
    tmp_path,
) -> None:
    patience = launch.FailureLimit(str(tmp_path), 2)
    for step in range(10):  # ten failures, each after a new checkpoint
        folder = tmp_path / "checkpoints" / f"step-{step:09d}-x"
        folder.mkdir(parents=True)
        commit = {"format": 1, "step": step, "score": None, "files": {}}
        commit["sha256"] = hashlib.sha256(json.dumps(commit, sort_keys=True).encode()).hexdigest()
        (folder / "COMMIT").write_text(json.dumps(commit))
        assert patience.make_decision(failed("a fault")) == FailureDecision.RETRY
    assert patience.make_decision(failed("a bug")) == FailureDecision.RETRY
    taken = PreemptionError(SimpleNamespace(preempted_ranks=[0]))
    assert patience.make_decision(taken) == FailureDecision.RETRY  # does not count
    assert patience.make_decision(failed("a bug")) == FailureDecision.RAISE


def test_a_controller_gives_back_what_the_one_before_it_in_this_run_had_reserved(
    tmp_path, monkeypatch
) -> None:
    asked = []
    monkeypatch.setattr(launch, "TIMINGS", {})
    monkeypatch.setattr(launch, "ask_coordinator", lambda *words: asked.append(words))
    for run_id in ("a", "b", "c"):
        launch.Recovery(str(tmp_path), elastic=True).after_controller_start(
            SimpleNamespace(run_id=run_id)
        )
    assert asked == [("cancel_request", "train-a"), ("cancel_request", "train-b")]


def test_events_go_on_in_the_file_of_an_earlier_controller_and_outlast_storage_that_is_away(
    tmp_path, monkeypatch
) -> None:
    def log(*events: str) -> launch.EventLog:
        written = launch.EventLog(str(tmp_path))
        for event in events:
            written._record(event)
        written.after_controller_finish(None)
        return written

    log("started", "failed")
    later = log("started")
    put = storage.put_bytes
    monkeypatch.setattr(
        storage, "put_bytes", lambda *_, **__: (_ for _ in ()).throw(storage.StorageError("away"))
    )
    later._record("failed")
    later.after_controller_finish(None)
    monkeypatch.setattr(storage, "put_bytes", put)
    later._record("finished")
    later.after_controller_finish(None)
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == [
        "started",
        "failed",
        "started",
        "failed",
        "finished",
    ]
    assert all(abs(line["time"] - time.time()) < 60 for line in lines)


@pytest.mark.slow
def test_a_run_that_lost_a_worker_of_two_ends_with_the_bits_of_one_left_alone(
    tiny_data, tmp_path, started
) -> None:
    run = started(tiny_data, tmp_path / "run", "cluster.num_workers=2", steps=QUICK_STEPS)
    alone = left_alone(tiny_data, tmp_path / "alone", QUICK_STEPS, OFTEN)
    run.until_step(12)
    seconds = run.seconds_to_next_step(lambda: os.kill(run.workers()[1].pid, signal.SIGKILL))
    run.finish()
    same(run, alone)
    assert recorded(run) == [("started", 2), ("failed", 2), ("started", 2), ("finished", 2)]
    assert run.events()[1]["error"]
    print(f"worker killed -> next step: {seconds:.1f} s")
    assert seconds < 40


@pytest.mark.slow
def test_ctrl_c_ends_a_run_with_status_130_and_the_same_command_goes_on(
    undisturbed, tiny_data, tmp_path, started
) -> None:
    run = started(tiny_data, tmp_path / "run", "cluster.num_workers=2")
    run.until_step(12)
    left = run.family()
    run.driver.send_signal(signal.SIGINT)
    assert run.driver.wait(60) == 130
    assert "the same command goes on" in run.log.read_text()
    assert not psutil.wait_procs(left, timeout=10)[1]
    run.start()
    run.finish()
    same(run, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_stopped_worker_is_taken_for_hung_and_replaced(
    num_workers, undisturbed, tiny_data, tmp_path, started
) -> None:
    run = started(tiny_data, tmp_path / "run", f"cluster.num_workers={num_workers}")
    run.until_step(12)
    victim = run.workers()[-1]
    seconds = run.seconds_to_next_step(lambda: os.kill(victim.pid, signal.SIGSTOP))
    assert not victim.is_running(), "it could wake up and write"
    print(f"one of {num_workers} workers stopped -> next step: {seconds:.1f} s")
    run.finish()
    same(run, undisturbed)
    assert recorded(run) == [
        (event, num_workers) for event in ("started", "failed", "started", "finished")
    ]
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
    assert recorded(run) == [("started", 2), ("started", 2), ("finished", 2)]
    assert not psutil.wait_procs(left, timeout=5)[1]


@pytest.mark.slow
def test_an_elastic_run_whose_driver_was_killed_has_all_its_workers_when_it_starts_again(
    nodes, undisturbed, tiny_data, tmp_path, started
) -> None:
    """Ray keeps a dead controller's reservation for 3 minutes; the new one gives it back."""
    run = started(tiny_data, tmp_path / "run", "cluster.num_workers=[1,2]", nodes.address)
    run.until_step(12)

    def kill_and_start() -> None:
        run.kill_driver()
        run.start()

    seconds = run.seconds_to_next_step(kill_and_start)
    print(f"driver killed and started again on the same cluster -> next step: {seconds:.1f} s")
    run.finish()
    same(run, undisturbed)
    assert recorded(run) == [("started", 2), ("started", 2), ("finished", 2)]
    assert seconds < 60


@pytest.mark.slow
def test_an_elastic_run_survives_the_loss_of_a_node_and_uses_one_that_joins(
    nodes, tiny_data, tmp_path, started
) -> None:
    """Long, because Ray looks for new nodes every 20 s only."""
    elastic = ["cluster.num_workers=[1,2]", "cluster.elastic_check_seconds=5", nodes.address]
    run = started(tiny_data, tmp_path / "run", *elastic, steps=ELASTIC_STEPS)
    run.until_step(12)
    assert recorded(run) == [("started", 2)]
    seconds = run.seconds_to_next_step(nodes.lose_second)
    print(f"node lost -> next step: {seconds:.1f} s")
    assert recorded(run)[-1] == ("started", 1)
    joined = run.seconds_to_next_step(nodes.join)
    print(f"node joined -> step with it: {joined:.1f} s")
    assert recorded(run)[-1] == ("started", 2)
    run.finish()
    same(run, left_alone(tiny_data, tmp_path / "alone", ELASTIC_STEPS, OFTEN))
    assert [event for event, _ in recorded(run)].count("failed") <= 2, run.events()
    assert seconds < 60 and joined < 90


@pytest.mark.slow
def test_a_preemption_notice_makes_a_checkpoint_and_the_run_goes_on_from_it(
    nodes, undisturbed, tiny_data, tmp_path, started
) -> None:
    """No other checkpoint is due in this run, so what it goes on from is the one of the notice."""
    seldom = ["training.checkpoint_every=100000", "validation.every_steps=100000"]
    elastic = [
        "cluster.num_workers=[1,2]",
        "cluster.elastic_check_seconds=600",
        "cluster.preemption_check_steps=5",
    ]
    run = started(tiny_data, tmp_path / "run", *seldom, *elastic, nodes.address)
    run.until_step(12)
    assert not committed_steps(run)
    began = time.monotonic()
    nodes.drain_second(8)
    steps = run.until(lambda: committed_steps(run), "committed")
    print(f"notice -> checkpoint committed: {time.monotonic() - began:.1f} s")
    assert len(steps) == 1 and steps[0] % 5 == 0
    seconds = run.seconds_to_next_step(nodes.lose_second)
    print(f"node taken away -> next step: {seconds:.1f} s")
    assert run.step() > steps[0]
    run.finish()
    same_losses, weights = undisturbed
    assert history(run.run_dir) == same_losses
    assert final_hash(run.run_dir) == weights
    assert recorded(run)[0] == ("started", 2) and recorded(run)[-2:] == [
        ("started", 1),
        ("finished", 1),
    ]


def committed_steps(run: Run) -> list[int]:
    return [one.step for one in find_committed(str(run.run_dir / "checkpoints"))]
