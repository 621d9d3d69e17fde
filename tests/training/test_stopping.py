"""A run that is told to stop commits a step that all ranks agree on, and keeps its bits."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from sepdist import config, storage
from sepdist.config import ConfigError
from sepdist.console import Stopped, signals_to, user_console
from sepdist.training.audit import audit
from sepdist.training.checkpoint import find_committed
from sepdist.training.stopping import StopRequest
from tests.support.runs import ROOT, final_hash, frozen, history, loop

STEPS = ["training.max_steps=12", "training.checkpoint_every=100", "validation.every_steps=6"]


def train(rank: int, world_size: int, path: str, store: str, asked_at: int) -> None:
    """Train as one of several; the last rank alone is asked to stop, in its step `asked_at`."""
    import torch

    from sepdist.training import loop
    from sepdist.training.world import World

    os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    calls: list[int] = []
    finished = loop.train(
        config.load_frozen(path),
        World(rank, world_size, torch.device("cpu")),
        stopping=lambda: calls.append(1) or (rank == world_size - 1 and len(calls) >= asked_at),  # type: ignore[func-returns-value]
    )
    assert finished == (asked_at >= 12)
    dist.destroy_process_group()


def test_all_ranks_stop_at_the_step_in_which_one_was_asked_and_the_run_keeps_its_bits(
    tiny_data, tmp_path: Path
) -> None:
    loop(frozen(tiny_data, tmp_path / "whole", *STEPS))
    path = frozen(tiny_data, tmp_path / "cut", *STEPS)
    for attempt, (world_size, asked_at, reached) in enumerate([(2, 5, 5), (1, 1, 6), (1, 99, 12)]):
        store = str(tmp_path / f"store{attempt}")
        arguments = (world_size, path, store, asked_at)
        mp.start_processes(train, arguments, nprocs=world_size, start_method="forkserver")
        assert find_committed(f"{tmp_path}/cut/checkpoints")[-1].step == reached
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    assert final_hash(tmp_path / "cut") == final_hash(tmp_path / "whole")
    assert audit(str(tmp_path / "cut")).sound


def heard(request: StopRequest, number: int) -> None:
    with signals_to(request.heard):
        signal.raise_signal(number)


@pytest.fixture
def restored() -> Iterator[None]:
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_asks_and_the_second_ends_at_once(number: int, restored: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored
    request, asked = StopRequest(), []
    request.first = lambda: asked.append(request.number)
    heard(request, number)
    assert request.asked() and asked == [number]
    with pytest.raises(Stopped) as ended:
        heard(request, signal.SIGTERM)
    assert asked == [number] and ended.value.number == number


def test_before_a_run_trains_a_signal_ends_it_at_once() -> None:
    with pytest.raises(Stopped):
        heard(StopRequest(), signal.SIGTERM)


def test_a_lost_lease_ends_the_run_at_once_with_the_reason() -> None:
    request = StopRequest()
    request.first = pytest.fail
    with pytest.raises(ConfigError, match="taken over"), signals_to(request.heard):
        threading.Thread(target=request.lose, args=("taken over by x",)).start()
        time.sleep(10)


def test_handlers_are_put_back_and_an_ignored_signal_stays_ignored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    hup = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with signals_to(pytest.fail):
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) is not before
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGHUP, hup)


def test_the_status_of_a_program_is_that_of_the_signal_which_ended_it(capsys) -> None:
    for error, status in ((KeyboardInterrupt(), 130), (Stopped(signal.SIGTERM), 143)):
        with pytest.raises(SystemExit) as ended, user_console(stopped="go on"):
            raise error
        assert ended.value.code == status
    assert capsys.readouterr().err == "stopped; go on\n" * 2


def start(*arguments: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(condition: Any, process: subprocess.Popen[str], seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def run_module(path: str, log: str) -> None:
    """`python -m sepdist.training.loop path > log 2>&1`, forked where its imports are done."""
    from sepdist.training import loop

    os.environ["DS_ACCELERATOR"] = "cpu"
    handle = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1), os.dup2(handle, 2)
    sys.argv = ["loop", path]
    loop.main()


LONG = ["training.max_steps=100000", "training.checkpoint_every=100000"]


def test_a_loop_without_ray_that_gets_sigterm_commits_and_refuses_a_second_one(
    tiny_data, tmp_path: Path
) -> None:
    path = frozen(tiny_data, tmp_path / "run", *LONG, "validation.every_steps=100000")
    log = tmp_path / "log"
    first = mp.get_context("forkserver").Process(target=run_module, args=(path, str(log)))
    first.start()
    try:
        while not (log.exists() and len(history(tmp_path / "run")) > 3):
            assert first.is_alive(), log.read_text()
            time.sleep(0.05)
        second = start("-m", "sepdist.training.loop", path)
        output, _ = second.communicate(timeout=120)
        assert second.returncode == 1 and output.count("error: ") == 1, output
        assert f"being trained by process {first.pid}" in output and "Traceback" not in output
        os.kill(first.pid, signal.SIGTERM)
        first.join(120)
    finally:
        first.kill()
    output = log.read_text()
    assert first.exitcode == 143 and "stopped; the same command goes on" in output, output
    [committed] = find_committed(f"{tmp_path}/run/checkpoints")
    assert committed.step == max(history(tmp_path / "run")) > 3
    assert storage.list_names(f"{tmp_path}/run/lease") == ["000001.json"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.xdist_group("ray")
def test_a_run_in_ray_workers_commits_at_a_signal_and_a_second_command_is_refused(
    number: int, status: int, tiny_data, tmp_path: Path
) -> None:
    from tests.support.runs import train_arguments

    run_dir = tmp_path / "run"
    more = [*LONG, "validation.every_steps=100000", "init.weights=null", "init.reinit=[]"]
    command = train_arguments("demo/finetune", tiny_data, run_dir, "cluster.num_workers=2", *more)
    first = start(*command)
    until(lambda: len(history(run_dir)) > 3, first)
    second = start(*command)
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 1 and "being trained by process" in output, output
    first.send_signal(number)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == status and "stopped; the same command goes on" in output, output
    assert "committing a checkpoint" in output and "Traceback" not in output
    [committed] = find_committed(f"{run_dir}/checkpoints")
    assert committed.step == max(history(run_dir)) > 3
