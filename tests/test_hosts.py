"""Several hosts with a network that fails: the lab itself, and runs on it that end with their bits.

The benchmark of several hosts inflicts all faults; here are three of them.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from tests.support.lab.hosts import Host, Lab, why_not_here
from tests.support.runs import program
from tests.support.s3server import ADMIN

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("ray"),
    pytest.mark.skipif(bool(why_not_here()), reason=why_not_here()),
]

CONNECT = """
import socket, sys, time
began = time.monotonic()
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=2).close()
    print(time.monotonic() - began)
except OSError as error:
    print(error)
"""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path, num_hosts=2)
    yield lab
    lab.close()


def on(host: Host, *command: str) -> str:
    done = subprocess.run(
        host.inside(*command), capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()


def connect(host: Host, lab: Lab) -> str:
    """Connect from a host to the S3 server: the seconds that it took, or the error."""
    store = lab.hosts["s3"].address, str(lab.s3.ports["s3"])
    return on(host, sys.executable, "-c", CONNECT, *store)


def test_a_host_is_cut_off_alone_and_is_back_when_the_network_is_healed(lab) -> None:
    one, other = lab.workers
    assert float(connect(one, lab)) < 2
    lab.switch.impair(one.name, cut=True)
    assert connect(one, lab) == "timed out"
    assert float(connect(other, lab)) < 2
    lab.switch.heal()
    lab.switch.separate(other.name, "s3")
    assert float(connect(one, lab)) < 2
    assert connect(other, lab) == "timed out"
    lab.switch.heal()
    assert float(connect(other, lab)) < 2


def test_a_link_delays_both_ways_or_loses_what_it_is_told_to(lab) -> None:
    host = lab.workers[0]
    lab.switch.impair(host.name, delay=[0.2, 0.25])
    assert float(connect(host, lab)) >= 0.4  # one frame there and one back
    lab.switch.heal()
    lab.switch.impair(host.name, loss=1.0)
    assert connect(host, lab) == "timed out"


def test_a_host_that_lost_its_power_has_no_processes_and_can_be_started_again(lab) -> None:
    host = lab.workers[0]
    log = lab.folder / "sleep.log"
    sleeper = host.start("sleep", "1000", log=log)
    host.lose_power()
    assert sleeper.wait(30) != 0
    host.boot()
    lab.switch.heal()
    assert "sleep" not in on(host, "ps", "ax", "-o", "comm")
    assert float(connect(host, lab)) < 2


def test_a_host_has_a_name_a_home_and_shared_memory_of_its_own(lab) -> None:
    for host in lab.workers:
        assert on(host, "hostname") == host.name
        assert on(host, "getent", "hosts", host.name).split()[0] == host.address
        on(host, "touch", f"/dev/shm/{host.name}")
        assert on(host, "ls", "/dev/shm") == host.name


def test_a_key_that_was_replaced_is_refused_and_the_new_one_is_in_the_hosts_files(lab) -> None:
    new = "another", "secret-another-0123456789"
    lab.s3.allow(ADMIN, new)
    lab.set_key(new)
    lab.s3.allow(new)
    deadline = time.monotonic() + 30
    with pytest.raises(ClientError, match="InvalidAccessKeyId"):
        while time.monotonic() < deadline:  # the server reads its file in its own time
            lab.s3.client(ADMIN).list_buckets()
    assert lab.s3.client(new).list_buckets()["Buckets"]
    assert all(new[1] in host.credentials.read_text() for host in lab.workers)


@pytest.mark.parametrize("own_names", ["address", "debian"])
def test_a_run_on_three_hosts_ends_with_its_bits_in_spite_of_faults(own_names, tmp_path) -> None:
    """Debian's hosts know themselves as 127.0.1.1, which no other host can reach."""
    faults = {
        "address": "worker-cut:10 s3-cut:20 sigterm:command",
        "debian": "loss:2 s3-killed:10 host-lost:10 rotate:5",
    }
    arguments = ["--own-names", own_names, "--steps", "600", "--keep", str(tmp_path)]
    output = program(
        "-m", "benchmarks.chaos_hosts", *arguments, "--faults", faults[own_names], timeout=1800
    )
    found = json.loads(output.strip().splitlines()[-1])
    assert found["same_losses"] and found["same_weights"] and found["same_optimizer"]
    assert (found["lost"], found["repeated"]) == (0, 0)
    assert [one["fault"] for one in found["faults"]] == faults[own_names].split()
    assert not any(one["missing"] for one in found["faults"])
    ended = {one["fault"]: one["ended"] for one in found["faults"] if one["ended"]}
    asked = {"sigterm:command": ["status 143, started again"]}  # 128 + SIGTERM
    assert ended == {fault: asked[fault] for fault in faults[own_names].split() if fault in asked}


def test_a_run_on_s3_that_is_killed_whenever_ends_with_the_bits_of_one_left_alone() -> None:
    counts = ["--training", "4", "--starting", "3", "--ray", "2", "--steps", "250"]
    output = program("-m", "benchmarks.kills", *counts, timeout=1800)
    found = json.loads(output.strip().splitlines()[-1])
    assert found["same_losses"] and found["same_weights"] and found["same_optimizer"]
    assert (found["lost"], found["repeated"]) == (0, 0)
