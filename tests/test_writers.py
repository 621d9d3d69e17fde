"""Two commands on one run_dir: the second is refused, or takes over from a host that is gone."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sepdist import storage
from sepdist.training.audit import audit
from tests.support.disturb import left_alone
from tests.support.lab.hosts import BUCKET, SITE, Host, Lab, end, why_not_here
from tests.support.runs import ROOT, TINY, final_hash, frozen, history, upload

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("ray"),
    pytest.mark.skipif(bool(why_not_here()), reason=why_not_here()),
]
STEPS = 400
SETTINGS = [*TINY, "validation.every_steps=100", "training.checkpoint_every=10"]
RUN_DIR = f"s3://{BUCKET}/run"


class Writers:
    """Single processes without Ray on the hosts of a lab, all with the same run_dir."""

    def __init__(self, lab: Lab, data: dict[str, str]) -> None:
        self.lab = lab
        urls = upload(data, f"s3://{BUCKET}/data")
        places = [f"run_dir={RUN_DIR}", "data.cache_dir=/dev/shm/sepdist"]
        more = [*places, f"training.max_steps={STEPS}"]
        config = frozen(urls, lab.folder / "config", *more, settings=SETTINGS)
        storage.put_bytes(f"{RUN_DIR}/config.yaml", Path(config).read_bytes())
        self.pace = lab.folder / "pace"
        self.pace.write_text("0.5")
        self.started: list[psutil.Popen] = []

    def start(self, host: Host) -> psutil.Popen:
        paced = {"LAB_PACE": str(self.pace), "LAB_STEPS": str(self.steps_file(host))}
        more = {**self.lab.aws(), **paced, "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, "-m", "sepdist.training.loop", f"{RUN_DIR}/config.yaml"]
        self.started.append(host.start(*command, log=self.log(host), **more))
        return self.started[-1]

    def steps_file(self, host: Host) -> Path:
        return self.lab.folder / f"steps-{host.name}"

    def log(self, host: Host) -> Path:
        return self.lab.folder / f"writer-{host.name}.log"

    def says(self, host: Host) -> str:
        return self.log(host).read_text(errors="replace")

    def until_steps(self, host: Host, more: int, seconds: float = 300.0) -> None:
        """Wait for a number of further steps of a host."""

        def count() -> int:
            path = self.steps_file(host)
            return len(path.read_text().splitlines()) if path.exists() else 0

        before = count()
        wait(lambda: count() >= before + more, seconds, lambda: self.says(host)[-3000:])


def wait(ready: Callable[[], Any], seconds: float, tell: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, tell()
        time.sleep(0.1)


@pytest.fixture
def writers(tmp_path: Path, tiny_data, monkeypatch) -> Iterator[Writers]:
    lab = Lab(tmp_path / "lab", num_hosts=2)
    for name, value in lab.s3.environment().items():
        monkeypatch.setenv(name, value)
    writers = Writers(lab, tiny_data)
    yield writers
    end(writers.started)
    lab.close()


@pytest.fixture(scope="module")
def alone(tiny_data, tmp_path_factory) -> tuple[dict[int, float], str]:
    return left_alone(tiny_data, tmp_path_factory.mktemp("alone"), STEPS, SETTINGS)


def same(run_dir: object, alone: tuple[dict[int, float], str]) -> None:
    assert history(run_dir) == alone[0]
    assert final_hash(run_dir) == alone[1]
    assert audit(str(run_dir)).sound


def test_a_second_command_on_another_host_is_refused_in_a_line_and_the_first_goes_on(
    writers, alone
) -> None:
    first, second = writers.lab.workers
    winner = writers.start(first)
    writers.until_steps(first, 5)
    refused = writers.start(second)
    assert refused.wait(180) not in (0, None)
    said = writers.says(second)
    assert "Traceback" not in said
    assert RUN_DIR in said and f"on {first.name}" in said
    assert not writers.steps_file(second).exists()
    writers.pace.write_text("0")
    assert winner.wait(300) == 0, writers.says(first)
    same(RUN_DIR, alone)


def test_a_host_that_is_cut_off_is_replaced_and_ends_when_it_is_back(writers, alone) -> None:
    first, second = writers.lab.workers
    old = writers.start(first)
    writers.until_steps(first, 25)
    writers.lab.switch.impair(first.name, cut=True)
    new = writers.start(second)
    writers.until_steps(second, 5)
    writers.lab.switch.heal()
    assert old.wait(120) not in (0, None), "it went on beside the one that replaced it"
    assert f"on {second.name}" in writers.says(first)
    assert "Traceback" not in writers.says(first)
    writers.pace.write_text("0")
    assert new.wait(300) == 0, writers.says(second)
    same(RUN_DIR, alone)


def test_a_killed_command_is_replaced_by_the_same_one_on_its_host_or_on_another(
    writers, alone
) -> None:
    first, second = writers.lab.workers
    for host in (first, first, second):
        writers.start(host)
        writers.until_steps(host, 12)
        end([writers.started[-1]])
    last = writers.start(second)
    writers.until_steps(second, 1)
    writers.pace.write_text("0")
    assert last.wait(300) == 0, writers.says(second)
    same(RUN_DIR, alone)


def test_of_two_commands_that_start_at_once_on_one_machine_one_trains(
    tiny_data, tmp_path, alone
) -> None:
    config = frozen(tiny_data, tmp_path / "run", f"training.max_steps={STEPS}", settings=SETTINGS)
    (tmp_path / "pace").write_text("0.05")  # so that one does not end before the other begins
    environment = {
        **os.environ,
        "PYTHONPATH": f"{SITE}:{ROOT}",
        "DS_ACCELERATOR": "cpu",
        "LAB_PACE": str(tmp_path / "pace"),
        "LAB_STEPS": str(tmp_path / "steps"),
    }
    command = [sys.executable, "-m", "sepdist.training.loop", config]
    logs = [tmp_path / f"{number}.log" for number in range(2)]
    processes = []
    for log in logs:
        with open(log, "wb") as file:
            processes.append(
                psutil.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
            )
    statuses = [process.wait(300) for process in processes]
    assert sorted(status != 0 for status in statuses) == [False, True], [
        log.read_text()[-2000:] for log in logs
    ]
    refused = logs[statuses.index(max(statuses, key=bool))].read_text()
    assert "Traceback" not in refused and str(tmp_path / "run") in refused
    same(tmp_path / "run", alone)
