"""cluster/slurm/train.sbatch: with stubs of Slurm's programs, and under Slurm on two hosts."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from sepdist.reporting import read_metrics
from tests.support.disturb import FRESH, left_alone
from tests.support.lab.hosts import Host, Lab, why_not_here
from tests.support.runs import ROOT, TINY, final_hash, history, started, train_arguments

SCRIPT = str(ROOT / "cluster" / "slurm" / "train.sbatch")
# A step on two nodes, each with what the environment of the test calls the step's own.
SRUN = """
while [ "${1:0:2}" = -- ]; do echo "srun $1" >> "$CALLS"; shift; done
trap 'kill $(jobs -p) 2>/dev/null; wait; exit' TERM
for node in 0 1; do
    SLURM_NODEID=$node SLURM_GPUS_ON_NODE=$STEP_GPUS CUDA_VISIBLE_DEVICES=$STEP_DEVICES \\
        SLURM_LAUNCH_NODE_IPADDR=10.0.0.$((1 + node)) "$@" &
done
wait
"""
RAY = """
echo "ray $*" >> "$CALLS"
if [ "$1" = start ]; then trap 'exit 0' TERM; while true; do sleep 0.05; done; fi
"""
PYTHON = """
echo "python $*" >> "$CALLS"
trap 'echo "python got TERM" >> "$CALLS"; exit 143' TERM
for _ in $(seq "$TENTHS"); do sleep 0.1; done
"""
SCONTROL = 'echo "scontrol $*" >> "$CALLS"'
UNTIL_TERM = """#!/bin/bash
echo python >> "$CALLS"
trap 'exit 0' TERM
while true; do sleep 0.05; done
"""
Job = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """Run the script as the first of two nodes of an exclusive job would, with stubs."""
    programs = tmp_path / "venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text(f"PATH={shlex.quote(str(programs))}:$PATH\n")
    stubs = {
        "srun": SRUN,
        "ray": RAY,
        "python": PYTHON,
        "scontrol": 'echo "scontrol $*" >> "$CALLS"',
    }
    for name, text in stubs.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}")
        (programs / name).chmod(0o755)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").touch()
    usual = {
        "HOME": str(tmp_path),
        "CALLS": str(tmp_path / "calls"),
        "SEPDIST_VENV": str(tmp_path / "venv"),
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",  # of an exclusive node
        "SLURM_CPUS_ON_NODE": "64",
        "STEP_GPUS": "2",
        "STEP_DEVICES": "",
        "TENTHS": "1",
    }
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with started() as run:

        def start(*words: str, **environment: str) -> subprocess.Popen[str]:
            command = ["bash", SCRIPT, "experiment=demo/finetune", *words]
            return run(*command, env=usual | environment, **options)

        yield start


def calls(folder: Path, what: str) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        lines = (folder / "calls").read_text().splitlines()
        return [line for line in lines if line.startswith(what)]
    return []


def until(ready: Callable[[], object], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"not {what} in {seconds:.0f} s"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("step", "num_gpus", "num_cpus"),
    [
        ({}, 2, 64),
        ({"STEP_GPUS": "8", "STEP_DEVICES": "3"}, 1, 64),
        ({"STEP_DEVICES": "MIG-aa,MIG-bb,MIG-cc"}, 3, 64),
        ({"SLURM_CPUS_PER_TASK": "16"}, 2, 16),
    ],
)
def test_ray_gets_what_the_step_was_given_and_not_what_the_node_has(
    job, tmp_path, step, num_gpus, num_cpus
) -> None:
    process = job("seed=3", **step)
    assert process.wait(60) == 0, process.communicate()
    head, other = sorted(calls(tmp_path, "ray start"), key=lambda line: "--head" not in line)
    share = f"--num-gpus={num_gpus} --num-cpus={num_cpus}"
    # The address is that of the node of the script as the last node sees it.
    assert "--head --node-ip-address=10.0.0.2 --port=6379" in head and head.endswith(share)
    assert "--address=10.0.0.2:6379" in other and other.endswith(share)
    workers = f"cluster=gpu cluster.num_workers={2 * num_gpus}"
    [training] = calls(tmp_path, "python")
    assert training == f"python -m sepdist train {workers} experiment=demo/finetune seed=3"
    asked = [one for one in calls(tmp_path, "srun") if "cpus-per-task" in one]
    assert set(asked) == ({"srun --cpus-per-task=16"} if num_cpus == 16 else set())


def test_a_job_without_gpus_has_one_worker_on_each_node(job, tmp_path) -> None:
    process = job(STEP_GPUS="")
    assert process.wait(60) == 0, process.communicate()
    [training] = calls(tmp_path, "python")
    assert training == "python -m sepdist train cluster.num_workers=2 experiment=demo/finetune"
    assert all(" --num-gpus=0 " in line for line in calls(tmp_path, "ray start"))


@pytest.mark.parametrize(
    ("number", "requeued"),
    [(signal.SIGUSR1, True), (signal.SIGTERM, False), (signal.SIGINT, False)],
)
def test_the_warning_of_the_time_limit_stops_the_run_and_requeues_the_job_and_scancel_does_not(
    job, tmp_path, number, requeued
) -> None:
    process = job(TENTHS="300")
    until(lambda: calls(tmp_path, "python"), "training")
    time.sleep(0.2)  # until the trap of the stub is set
    process.send_signal(number)
    assert process.wait(60) == 143
    assert len(calls(tmp_path, "python got TERM")) == 1
    assert calls(tmp_path, "scontrol") == (["scontrol requeue 7"] if requeued else [])


def test_a_run_that_ends_well_at_the_last_moment_is_not_requeued(job, tmp_path) -> None:
    (tmp_path / "venv" / "bin" / "python").write_text(UNTIL_TERM)
    process = job()
    until(lambda: calls(tmp_path, "python"), "training")
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 0 and not calls(tmp_path, "scontrol")


PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "munged")


def why_no_slurm() -> str:
    absent = [name for name in PROGRAMS if shutil.which(name, path="/usr/sbin:/usr/bin") is None]
    lacks = f"needs Debian's slurm-wlm and munge: no {', '.join(absent)}" if absent else ""
    return why_not_here() or lacks


CONFIG = """\
ClusterName=lab
SlurmctldHost={head}({head_address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
MpiDefault=none
KillWait=20
SchedulerParameters=bf_interval=1,sched_interval=1
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Slurm on two hosts, each of which claims 8 CPUs and 4 GPUs; jobs run a tiny training."""

    def __init__(self, lab: Lab, folder: Path, data: dict[str, str]) -> None:
        self.lab, self.folder, self.data = lab, folder, data
        self.head = lab.workers[0]
        self.pace = folder / "pace"
        for name in ("state", "home", *(f"spool-{host.name}" for host in lab.workers)):
            (folder / name).mkdir(parents=True)
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        place = {"folder": folder, "head": self.head.name, "head_address": self.head.address}
        nodes = [f"NodeName={h.name} NodeAddr={h.address} CPUs=8 Gres=gpu:4" for h in lab.workers]
        (folder / "slurm.conf").write_text(CONFIG.format(**place) + "\n".join(nodes) + "\n")
        for number in range(4):
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-3]\n")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid"}
        files |= {"log-file": "munge.log", "seed-file": "munge.seed"}
        options = [f"--{name}={folder / file}" for name, file in files.items()]
        self._start(self.head, "munged", "--force", "--foreground", *options)
        until((folder / "munge.socket").exists, "munged ready")
        self._start(self.head, "slurmctld", "-D")
        for host in lab.workers:
            self._start(host, "slurmd", "-D", "-N", host.name)
        until(lambda: "idle" in self.ask("sinfo", "-h", "-o", "%T"), "idle", 60)

    def _start(self, host: Host, *command: str) -> None:
        log = self.folder / f"{command[0]}-{host.name}.log"
        host.start(f"/usr/sbin/{command[0]}", *command[1:], log=log, **self.environment())

    def environment(self) -> dict[str, str]:
        return {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "HOME": str(self.folder / "home"),
            "SEPDIST_VENV": sys.prefix,
            "LAB_PACE": str(self.pace),
            "LAB_STEPS": str(self.folder / "steps"),
        }

    def ask(self, *command: str) -> str:
        done = subprocess.run(
            self.head.inside("env", f"--chdir={ROOT}", *command),
            env=self.head.environment(**self.environment()),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, run_dir: Path, steps: int, *options: str) -> str:
        """Submit a run; returns the number of the job."""
        settings = [*TINY, "training.checkpoint_every=5", "validation.every_steps=1000"]
        # There are no real ones, so none of what cluster=gpu of the script gives up bits for.
        settings += ["cluster.use_gpu=false", "cluster.cpus_per_worker=1", "optim.fused=null"]
        settings += ["engine.reduction=canonical", "engine.merge_shards=1", "engine.precision=fp32"]
        settings += ["engine.tf32=false", "engine.cuda_graphs=false"]
        words = train_arguments("demo/finetune", self.data, run_dir, *FRESH, settings=settings)[3:]
        words.append(f"training.max_steps={steps}")
        log = f"--output={self.folder}/job-%j.log"
        usual = ["sbatch", "--parsable", log, "--nodes=2", "--gpus-per-node=1", *options, SCRIPT]
        return self.ask(*usual, *words).strip()

    def job(self, number: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S+)", self.ask("scontrol", "show", "job", number)))

    def log(self, number: str) -> str:
        return (self.folder / f"job-{number}.log").read_text()

    def until(self, ready: Callable[[], object], what: str, job: str) -> None:
        """Wait up to ten minutes: on a busy machine Ray takes some of them to start."""
        try:
            until(ready, what, 600)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.job(job)}\n{self.log(job)[-6000:]}") from None


@pytest.fixture
def slurm(tmp_path: Path, tiny_data: dict[str, str]) -> Iterator[Slurm]:
    lab = Lab(tmp_path / "lab", num_hosts=2, own_names="debian")
    try:
        yield Slurm(lab, tmp_path / "slurm", tiny_data)
    finally:
        lab.close()


needs_slurm = pytest.mark.skipif(bool(why_no_slurm()), reason=why_no_slurm())


def rays_on(host: Host) -> list[str]:
    """The command lines of Ray's processes on a host."""
    found = []
    for process in psutil.Process(host.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            line = " ".join(process.cmdline())
            found += [line] if "raylet" in line or "gcs_server" in line else []
    return found


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@needs_slurm
def test_a_job_at_its_time_limit_is_requeued_and_ends_with_the_bits_of_a_run_left_alone(
    slurm, tmp_path
) -> None:
    run_dir, steps = tmp_path / "run", 200
    settings = [*TINY, "training.checkpoint_every=5", "validation.every_steps=1000"]
    alone = left_alone(slurm.data, tmp_path / "alone", steps, settings)
    slurm.pace.write_text("1")
    job = slurm.submit(run_dir, steps, "--signal=B:USR1@60", "--time=60")
    slurm.until(lambda: max(history(run_dir), default=0) >= 8, "at step 8", job)
    minutes = int(slurm.job(job)["RunTime"].split(":")[1])
    slurm.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + 2}")
    slurm.until(lambda: slurm.job(job)["Restarts"] == "1", "requeued", job)
    slurm.ask("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    slurm.pace.write_text("0")
    slurm.until(lambda: slurm.job(job)["JobState"] == "COMPLETED", "completed", job)
    assert "goes back into the queue" in slurm.log(job)
    assert (history(run_dir), final_hash(run_dir)) == alone
    trained = [row["step"] for row in read_metrics(str(run_dir)) if "loss/total" in row]
    assert trained == list(range(1, steps + 1))


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@needs_slurm
def test_a_cancelled_job_leaves_no_ray_behind_and_another_goes_on_with_its_run(
    slurm, tmp_path
) -> None:
    run_dir = tmp_path / "run"
    slurm.pace.write_text("1")
    job = slurm.submit(run_dir, 30)
    slurm.until(lambda: max(history(run_dir), default=0) >= 8, "at step 8", job)
    slurm.ask("scancel", job)
    slurm.until(lambda: slurm.job(job)["JobState"] == "CANCELLED", "cancelled", job)
    slurm.until(lambda: not any(map(rays_on, slurm.lab.workers)), "without Ray", job)
    assert slurm.job(job)["Restarts"] == "0"
    slurm.pace.write_text("0")
    other = slurm.submit(run_dir, 30)
    slurm.until(lambda: slurm.job(other)["JobState"] == "COMPLETED", "completed", other)
    assert sorted(history(run_dir)) == list(range(1, 31))
    assert "training from step 0 " not in slurm.log(other)
