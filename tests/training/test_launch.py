"""How the workers are started and find each other, and how often that may fail."""

import functools
import math
import os
import re
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import ControllerError

from sepdist.training import launch
from tests.support.disturb import Run, left_alone
from tests.support.lab.hosts import Lab, end, why_not_here
from tests.support.runs import TINY, final_hash, frozen, history, program
from tests.support.s3server import free_ports

Address = namedtuple("Address", "family address")
FOUR, SIX = socket.AF_INET, socket.AF_INET6


@pytest.fixture
def interfaces(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that this host has these interfaces, and that Ray knows it by this address."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)

    def pretend(ray_address: str, **table: list[Address]) -> None:
        monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: ray_address)
        monkeypatch.setattr(psutil, "net_if_addrs", lambda: table)
        monkeypatch.setattr(os, "environ", dict(os.environ))

    return pretend


LOOPBACK = [Address(FOUR, "127.0.0.1"), Address(SIX, "::1")]


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("10.0.0.5", "ens3"),
        ("192.168.7.5", "eth1"),  # not the first that is not loopback
        ("127.0.0.1", "lo"),  # a Ray that was started here
        ("fd00::5", "eth1"),
        ("fd00:0:0::5", "eth1"),  # the same address, written otherwise
        ("fe80::9", "ens3"),  # the system writes it with its interface
    ],
)
def test_workers_talk_through_the_interface_that_has_rays_address_of_their_host(
    interfaces, address, name
) -> None:
    link, eth1 = Address(SIX, "fe80::9%ens3"), [Address(FOUR, "192.168.7.5")]
    eth1.append(Address(SIX, "fd00::5"))
    interfaces(address, lo=LOOPBACK, ens3=[Address(FOUR, "10.0.0.5"), link], eth1=eth1)
    launch.use_ray_network()
    assert os.environ["GLOO_SOCKET_IFNAME"] == name
    assert os.environ["NCCL_SOCKET_IFNAME"] == f"={name}"


def test_interfaces_that_the_user_chose_stay(interfaces) -> None:
    interfaces("10.0.0.5", lo=LOOPBACK, ens3=[Address(FOUR, "10.0.0.5")])
    os.environ["NCCL_SOCKET_IFNAME"] = "ib0"
    launch.use_ray_network()
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("ens3", "ib0")


def test_an_address_that_no_interface_has_leaves_the_choice_to_the_libraries(interfaces) -> None:
    """That of a container whose host forwards ports to it, for example."""
    interfaces("203.0.113.9", lo=LOOPBACK, eth0=[Address(FOUR, "172.17.0.2")])
    launch.use_ray_network()
    assert not {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"} & set(os.environ)


# Two ranks form a group and add up 1 and 1; the host's address of Ray is the second argument.
GROUP = """
import sys, ray, torch, torch.distributed as dist
from sepdist.training import launch
rank, address, choose = int(sys.argv[1]), sys.argv[2], sys.argv[3]
ray.util.get_node_ip_address = lambda: address
if choose == "yes":
    launch.use_ray_network()
dist.init_process_group("gloo", rank=rank, world_size=2)
total = torch.ones(1)
dist.all_reduce(total)
print("total", total.item())
"""


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not_here()), reason=why_not_here())
def test_hosts_find_each_other_whatever_their_own_names_mean_and_their_interfaces_are_called(
    tmp_path,
) -> None:
    lab = Lab(tmp_path / "lab", num_hosts=2, own_names="debian")

    def group(addresses: list[str], choose: str) -> list[str]:
        (tmp_path / "group.py").write_text(GROUP)
        meeting = {"MASTER_ADDR": addresses[0], "MASTER_PORT": "29500"}
        ranks = []
        for rank, (host, address) in enumerate(zip(lab.workers, addresses, strict=True)):
            log = tmp_path / f"rank{rank}.log"
            log.unlink(missing_ok=True)
            command = [sys.executable, str(tmp_path / "group.py"), str(rank), address, choose]
            ranks.append(host.start(*command, log=log, **meeting))
        ranks[0].wait(120)
        psutil.wait_procs(ranks, timeout=20)
        end(ranks)  # the other may wait for one that has failed
        return [(tmp_path / f"rank{rank}.log").read_text() for rank in (0, 1)]

    def on(number: int, command: str) -> None:
        subprocess.run(lab.workers[number].inside(*command.split()), check=True, timeout=30)

    try:
        addresses = [host.address for host in lab.workers]
        assert any("connectFullMesh failed" in text for text in group(addresses, "no"))
        assert all("total 2.0" in text for text in group(addresses, "yes"))
        for host in lab.workers:  # no name at all
            (host.folder / "hosts").write_text("127.0.0.1 localhost\n")
        for change in ("down", "name ens7", "up"):
            on(1, f"ip link set {'ens7' if change == 'up' else 'eth0'} {change}")
        assert all("total 2.0" in text for text in group(addresses, "yes"))
        sixes = ["fd00:77::1", "fd00:77::2"]
        for number, name in enumerate(("eth0", "ens7")):
            on(number, f"ip -6 addr add {sixes[number]}/64 dev {name} nodad")
        assert all("total 2.0" in text for text in group(sixes, "yes"))
    finally:
        lab.close()


def in_a_worker(error: Exception) -> ControllerError:
    return ControllerError(RayTaskError("execute", "a traceback", error).as_instanceof_cause())


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (in_a_worker(RuntimeError("Gloo connectFullMesh failed")), "Gloo connectFullMesh failed"),
        (in_a_worker(OSError("address in use")), "address in use"),
        (ControllerError(WorkerGroupStartupFailedError("one failed")), "one failed"),
        (ControllerError(ActorDiedError()), "its process died"),
        (ControllerError(ValueError("from a callback")), "from a callback"),
    ],
)
def test_an_error_while_the_workers_start_counts_as_one_of_the_failures_in_a_row(
    tmp_path, caplog, error, text
) -> None:
    patience = launch.FailureLimit(str(tmp_path), 2)
    answers = [patience.make_decision(error) for _ in range(3)]
    assert answers == [FailureDecision.RETRY, FailureDecision.RETRY, FailureDecision.RAISE]
    assert f"failure 3 in a row: {text}" in caplog.text
    assert launch.root_cause(error) == text


def test_without_a_limit_a_start_is_tried_for_ever_and_with_none_allowed_once(tmp_path) -> None:
    error = in_a_worker(RuntimeError("Gloo connectFullMesh failed"))
    for allowed, last in ((-1, FailureDecision.RETRY), (0, FailureDecision.RAISE)):
        patience = launch.FailureLimit(str(tmp_path), allowed)
        assert [patience.make_decision(error) for _ in range(9)][-1] == last


def test_failures_at_the_start_and_later_ones_are_counted_together(tmp_path) -> None:
    patience = launch.FailureLimit(str(tmp_path), 2)
    assert patience.make_decision(in_a_worker(OSError("a"))) == FailureDecision.RETRY
    running = WorkerGroupError("b", {0: ValueError("b")})
    assert patience.make_decision(running) == FailureDecision.RETRY
    assert patience.make_decision(in_a_worker(OSError("c"))) == FailureDecision.RAISE


def test_waiting_for_room_is_no_failure_and_is_said_once(tmp_path, caplog) -> None:
    patience = launch.FailureLimit(str(tmp_path), 0)
    error = ControllerError(WorkerGroupStartupTimeoutError(16))
    events = launch.EventLog(str(tmp_path))
    state = SimpleNamespace(
        training_failed_error=error, _state_type=SimpleNamespace(state_name="RESCHEDULING")
    )
    for _ in range(20):
        assert patience.make_decision(error) == FailureDecision.RETRY
        events.after_controller_state_update(None, state)
    assert caplog.text.count("waiting for room") == 1
    assert not (tmp_path / "events.jsonl").exists()


def test_the_metrics_of_a_row_go_to_ray_under_their_names_and_that_of_the_run(monkeypatch) -> None:
    seen: dict[str, tuple[float, dict[str, str]]] = {}

    class Recorded:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            assert name not in seen and tag_keys == ("run",)
            self.name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            seen[self.name] = (value, tags)

    monkeypatch.setattr(launch, "gauge", functools.cache(Recorded))
    launch.publish("first", {"loss/total": 3.0, "speed/audio_seconds_per_second": 80.0})
    launch.publish("first", {"validation/si_snri": 4.5, "loss/total": math.inf})
    assert seen == {
        "sepdist_loss_total": (math.inf, {"run": "first"}),
        "sepdist_speed_audio_seconds_per_second": (80.0, {"run": "first"}),
        "sepdist_validation_si_snri": (4.5, {"run": "first"}),
    }


EXPORT = """
import sys, time, urllib.request, ray
from sepdist.training import launch
port = int(sys.argv[1])
ray.init(address="local", include_dashboard=False, num_cpus=1, log_to_driver=False,
         object_store_memory=100_000_000, _metrics_export_port=port)

@ray.remote
def work():
    launch.publish("a run", {"loss/total": 3.5, "validation/si_snri": 4.0})
    launch.Counter("sepdist_restarts", "failures", ("run",)).inc(2.0, {"run": "a run"})
    time.sleep(60)

running, text = work.remote(), ""
for _ in range(60):
    time.sleep(1)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    if "restarts" in text and "si_snri" in text and "loss" in text:
        break
print(text)
"""


@pytest.mark.slow
def test_prometheus_reads_the_metrics_of_a_run_from_rays_agent() -> None:
    output = program("-c", EXPORT, str(free_ports(1)[0]))
    read = re.findall(r'(?m)^(ray_sepdist_\w+)\{.*run="a run".*\} (\S+)$', output)
    assert {name: float(value) for name, value in read} == {
        "ray_sepdist_loss_total": 3.5,
        "ray_sepdist_validation_si_snri": 4.0,
        "ray_sepdist_restarts_total": 2.0,
    }


LEFT = """
import sys, time, psutil
from rich.console import Console
from sepdist import config
from sepdist.cluster import connected
from sepdist.training import run
with connected(1):
    for path in sys.argv[1:]:
        run.run(config.load_frozen(path), Console(stderr=True))
    for _ in range(30):
        time.sleep(1)
        names = [one.name() for one in psutil.Process().children(recursive=True)]
        left = [name for name in names if "TrainControl" in name or "StopFlag" in name]
        if not left:
            break
print("left:", left)
"""


@pytest.mark.slow
def test_finished_stages_leave_no_actors_in_the_ray_of_a_pipeline(tiny_data, tmp_path) -> None:
    more = ("training.max_steps=2", "validation.every_steps=2", "cluster.num_workers=1")
    paths = [frozen(tiny_data, tmp_path / name, *more) for name in ("first", "second")]
    assert "left: []" in program("-c", LEFT, *paths)


# What Python runs before all else: the first calls that set up a process group fail.
FAILING_STARTS = """
import os, sys
if any("default_worker" in word for word in sys.argv):
    import torch.distributed
    real = torch.distributed.init_process_group
    def fails(*args, **kwargs):
        for number in range(int(os.environ["NUM_FAILING"])):
            try:
                os.close(os.open(os.environ["MARKS"] + str(number), os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            if os.environ["HOW"] == "dies":
                os._exit(1)
            raise RuntimeError("Gloo connectFullMesh failed")
        return real(*args, **kwargs)
    torch.distributed.init_process_group = fails
"""


def start_that_fails(
    data: dict[str, str], folder: Path, how: str, times: int, *more: str, **options: Any
) -> Run:
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(FAILING_STARTS)
    python_path = f"{folder / 'site'}:{Path(__file__).parents[2]}"
    environment = {"PYTHONPATH": python_path, "MARKS": str(folder / "mark"), "HOW": how}
    environment["NUM_FAILING"] = str(times)
    settings = [*TINY, "validation.every_steps=40"]
    return Run(data, folder / "run", *more, settings=settings, steps=10, **environment, **options)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raises", "dies"])
def test_a_run_whose_first_starts_fail_ends_like_one_left_alone(tiny_data, tmp_path, how) -> None:
    alone = left_alone(tiny_data, tmp_path / "alone", 10, [*TINY, "validation.every_steps=40"])
    run = start_that_fails(tiny_data, tmp_path, how, 2, "cluster.num_workers=1")
    try:
        run.finish(900)  # a start takes over a minute on a busy machine
        assert (history(run.run_dir), final_hash(run.run_dir)) == alone
        happened = [event["event"] for event in run.events()]
        assert happened == ["failed", "failed", "started", "finished"]
    finally:
        run.end()


@pytest.mark.slow
def test_a_run_that_never_starts_ends_with_the_workers_error_in_one_line(
    tiny_data, tmp_path
) -> None:
    limit = ["cluster.num_workers=1", "cluster.max_failures=2"]
    run = start_that_fails(tiny_data, tmp_path, "raises", 9, *limit)
    try:
        assert run.driver.wait(900) == 1
        lines = run.log.read_text().splitlines()
        assert "error: Gloo connectFullMesh failed" in lines
        assert not [line for line in lines if "Traceback" in line]
        assert [event["event"] for event in run.events()] == ["failed"] * 3
    finally:
        run.end()
