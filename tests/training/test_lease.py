"""One command at a time trains a run; the others are refused, or take over what is dead."""

import json
import multiprocessing as mp
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sepdist import storage
from sepdist.config import ConfigError
from sepdist.training import lease as leases
from sepdist.training.lease import lease, process_id


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(leases, "STALE_SECONDS", 1.0)


def held(run_dir: object, lost: Any = None, said: list[str] | None = None) -> Any:
    said = [] if said is None else said
    return lease(str(run_dir), lost or pytest.fail, said.append)


def put_foreign(run_dir: object, number: int, **more: object) -> str:
    """The lease of a process of another host, of which this one cannot know whether it lives."""
    url = f"{run_dir}/lease/{number:06d}.json"
    holder = {"host": "elsewhere", "pid": 7, "process": ["another boot", "1"], **more}
    storage.put_bytes(url, json.dumps(holder).encode())
    return url


def names(run_dir: object) -> list[str]:
    return storage.list_names(f"{run_dir}/lease")


def test_a_second_command_is_refused_at_once_and_may_start_when_the_first_has_ended(
    tmp_path: Path,
) -> None:
    with held(tmp_path):
        with (
            pytest.raises(ConfigError, match=rf"being trained by process {os.getpid()} on .*stop"),
            held(tmp_path),
        ):
            pass
        time.sleep(0.3)  # some beats
    with held(tmp_path):
        assert names(tmp_path) == ["000002.json"]


def test_the_lease_of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from sepdist.training.lease import lease\n"
        "with lease(sys.argv[1], print, print): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"process {process.pid}"), held(tmp_path):
        pass
    process.kill()
    process.wait()
    said: list[str] = []
    with held(tmp_path, said=said):
        assert names(tmp_path) == ["000002.json"] and said == []


def test_a_process_of_the_same_number_is_another_process(tmp_path: Path) -> None:
    mine = process_id(os.getpid())
    put_foreign(tmp_path, 1, pid=os.getpid(), process=[mine[0], str(int(mine[1]) - 1)])
    with held(tmp_path):
        assert names(tmp_path) == ["000002.json"]


def test_a_silent_lease_of_another_host_is_taken_over_when_it_is_stale(tmp_path: Path) -> None:
    put_foreign(tmp_path, 41)
    said: list[str] = []
    began = time.monotonic()
    with held(tmp_path, said=said):
        assert names(tmp_path) == ["000042.json"]
    assert time.monotonic() - began >= 1.0
    [line] = said
    assert "process 7 on elsewhere" in line and "waiting up to 1 s" in line


def test_a_lease_of_another_host_that_beats_is_respected(tmp_path: Path) -> None:
    put_foreign(tmp_path, 1)
    beats = threading.Thread(
        target=lambda: [time.sleep(0.3), put_foreign(tmp_path, 1, beat=5)]  # type: ignore[func-returns-value]
    )
    beats.start()
    with pytest.raises(ConfigError, match="process 7 on elsewhere"), held(tmp_path):
        pass
    beats.join()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"released": true}'])
def test_a_released_or_damaged_lease_is_free(content: bytes, tmp_path: Path) -> None:
    storage.put_bytes(f"{tmp_path}/lease/000003.json", content)
    with held(tmp_path):
        assert names(tmp_path) == ["000004.json"]


def test_a_holder_that_was_away_learns_that_it_was_replaced(tmp_path: Path) -> None:
    lost: list[str] = []
    with held(tmp_path, lost=lost.append):
        put_foreign(tmp_path, 2)  # as another host does when this one did not beat
        for _ in range(100):
            if lost:
                break
            time.sleep(0.05)
    assert "taken over by process 7 on elsewhere" in lost[0]
    assert json.loads(storage.read_bytes(f"{tmp_path}/lease/000002.json"))["host"] == "elsewhere"


def test_storage_that_is_away_for_a_while_costs_no_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held(tmp_path):
        with monkeypatch.context() as away:
            for name in ("put_bytes", "list_names"):
                away.setattr(storage, name, lambda *_, **__: (_ for _ in ()).throw(OSError("away")))
            time.sleep(0.3)
        before = storage.read_bytes(f"{tmp_path}/lease/000001.json")
        for _ in range(100):
            if storage.read_bytes(f"{tmp_path}/lease/000001.json") != before:
                break
            time.sleep(0.05)
        assert storage.read_bytes(f"{tmp_path}/lease/000001.json") != before


def compete(run_dir: str, environment: dict[str, str], start: Any, results: Any) -> None:
    os.environ.update(environment)  # the fork server has that of its own start
    start.wait()
    try:
        with lease(run_dir, lambda _: None, lambda _: None):
            results.put("held")
            time.sleep(1.0)
    except ConfigError:
        results.put("refused")


@pytest.mark.parametrize("remote", [False, True])
def test_of_many_that_start_together_one_gets_the_lease(
    remote: bool, tmp_path: Path, bucket: str
) -> None:
    run_dir = f"s3://{bucket}/run" if remote else str(tmp_path)
    put_foreign(run_dir, 1, released=True)
    context = mp.get_context("forkserver")
    start, results = context.Event(), context.Queue()
    arguments = (run_dir, dict(os.environ), start, results)
    racers = [context.Process(target=compete, args=arguments) for _ in range(4)]
    for one in racers:
        one.start()
    start.set()
    assert sorted(results.get(timeout=60) for _ in racers) == ["held"] + ["refused"] * 3
    for one in racers:
        one.join()


def test_the_lease_in_a_copy_of_a_run_that_goes_on_is_no_lease_of_the_copy(tmp_path: Path) -> None:
    with held(tmp_path / "base"):
        shutil.copytree(tmp_path / "base", tmp_path / "copy")
        with held(tmp_path / "copy"):
            assert names(tmp_path / "copy") == ["000002.json"]
        with pytest.raises(ConfigError, match="base is being trained"), held(tmp_path / "base"):
            pass
