"""Ray Train: a frozen run in, the same loop in N workers out; a worker that dies is replaced and the run goes on.

The worker function only joins the process group that Ray made and calls `loop.train`; checkpoints are the run's own
(checkpoint.py), so Ray's storage holds no more than its own bookkeeping. Out, beside what the loop writes:
run_dir/events.jsonl, one line per start, failure, resize and end of the workers.

How long a fault may take is decided here (`TIMINGS`, and the health checks in cluster.py); docs/training.md says what
was measured. The callbacks use hooks of Ray Train that are not public: Ray is pinned to one minor version.
"""

import contextlib
import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2.api.exceptions import ControllerError, PreemptionError

from sepdist import config, storage
from sepdist.cluster import connected
from sepdist.config import TrainConfig
from sepdist.training.checkpoint import find_committed

logger = logging.getLogger(__name__)

TIMINGS = {
    # The controller looks at its workers this often; Ray's 2 s only delay what follows.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # A worker whose main thread does not answer for so long is taken for hung. That thread does nothing but answer:
    # training runs in another one, which holds Python's lock for at most a second or so (imports, a large pickle);
    # compilation is Python, which gives the lock up, or a process of its own. Ray's default is 10 minutes.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "20",
    # What a dying group may take to say goodbye, where one of its workers is stopped or unreachable; Ray's is 30 s.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "1",
    # A cloud gives between 30 s (a pod, Google) and 120 s (AWS) of notice.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
}
# How long an elastic group waits for the room it was promised before it asks again: after the loss of a node the
# promise may be stale. A group of fixed size has nothing else to ask for and keeps Ray's 60 s.
ELASTIC_START_SECONDS = "10"
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
)  # gloo's words for a worker that is gone


class TrainingFailedError(RuntimeError):
    """The workers failed more often than `cluster.max_failures` allows; the message is the last worker's own error."""


def launch(cfg: TrainConfig) -> None:
    """Train the run frozen at `cfg.run_dir` in Ray Train workers; returns when it has finished.

    Raises:
        TrainingFailedError: a worker's error, once the allowed restarts are used up.
        KeyboardInterrupt: Ctrl-C; the workers have ended.
    """
    fewest, most = config.worker_range(cfg.cluster)
    for name, value in TIMINGS.items():
        os.environ.setdefault(name, value)
    if fewest < most:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", ELASTIC_START_SECONDS)
    needed = math.ceil(most * cfg.cluster.cpus_per_worker)
    with connected(needed, address=cfg.cluster.address, verbose=cfg.cluster.verbose):
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"config": storage.join(cfg.run_dir, "config.yaml")},
            scaling_config=ScalingConfig(
                num_workers=most if fewest == most else (fewest, most),  # type: ignore[arg-type]  # as below
                elastic_resize_monitor_interval_s=cfg.cluster.elastic_check_seconds,  # type: ignore[call-arg]
                use_gpu=cfg.cluster.use_gpu,
                resources_per_worker={"CPU": cfg.cluster.cpus_per_worker}
                | ({"GPU": 1.0} if cfg.cluster.use_gpu else {}),
            ),
            torch_config=TorchConfig(
                backend="nccl" if cfg.cluster.use_gpu else "gloo",
                timeout_s=cfg.cluster.collective_timeout_seconds,
            ),
            run_config=RunConfig(  # type: ignore[call-arg]  # mypy sees the class of Ray Train v1
                name="ray",
                storage_path=cfg.run_dir,
                failure_config=FailureConfig(max_failures=-1),  # Recovery counts them
                worker_runtime_env={"env_vars": worker_environment(cfg)},
                callbacks=[
                    EventLog(cfg.run_dir),  # type: ignore[list-item]
                    Recovery(cfg.run_dir, cfg.cluster.max_failures, elastic=fewest < most),  # type: ignore[list-item]
                ],
            ),
        )
        try:
            with interrupts():
                trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise TrainingFailedError(root_cause(error)) from error


@contextlib.contextmanager
def interrupts() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt, here and later: Ray Train's own handler stops the workers, exits, and stays."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def worker_environment(cfg: TrainConfig) -> dict[str, str]:
    """Environment of the workers. Credentials are not in it: workers have them from their own machine."""
    environment = {
        "OMP_NUM_THREADS": str(cfg.cluster.threads_per_worker),
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONWARNINGS": "ignore",
    }
    if not cfg.cluster.use_gpu:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def train_worker(arguments: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    from sepdist.training import loop
    from sepdist.training.world import join_world

    world = join_world()
    logging.basicConfig(
        level=logging.INFO if world.is_main else logging.WARNING,
        format=f"%(asctime)s rank {world.rank} %(name)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    for chatty in ("deepspeed", "ray"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    cfg = config.load_frozen(arguments["config"])
    loop.train(cfg, world, report=ray.train.report, preempted=preemption_notice())


def preemption_notice() -> Callable[[], bool]:
    """A function that says, once per notice and on all ranks alike, that a node of this group will be taken away.

    Ray answers what rank 0 knows, on every rank, and goes on answering it until the group ends.
    """
    known: Any = None

    def preempted() -> bool:
        nonlocal known
        notice = ray.train.get_preemption_info()
        new = notice is not None and notice != known
        known = notice
        return new

    return preempted


class EventLog(WorkerGroupCallback, ControllerCallback):
    """Writes run_dir/events.jsonl from Ray Train's controller, which outlives the workers.

    One object per line: `time` (Unix seconds), `event` ("started", "failed", "resized", "finished"), `workers` (how
    many; for "resized" how many there will be) and, for "failed", `error` in one line. The file is small and written
    whole, in a thread of its own, so that storage that is away never holds up a recovery; what could not be written is
    written with the next event. A later start of the run goes on in the same file.
    """

    def __init__(self, run_dir: str) -> None:
        self._url = storage.join(run_dir, "events.jsonl")
        self._lines: list[str] | None = None  # what is written
        self._unwritten: list[str] = []
        self._workers = 0
        self._seen: BaseException | None = None
        self._pool: ThreadPoolExecutor | None = (
            None  # made in the controller: a pool does not travel
        )
        self._last: Future[None] | None = None

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """The workers run the training function."""
        self._workers = len(worker_group)
        self._record("started")

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """The controller decided something: failures and resizes are states of their own."""
        error = failure_of(current_state)
        if error is not None and error is not self._seen:
            self._seen = error
            self._record("failed", error=root_cause(error))
        name = state_name(current_state)
        if name == "RESIZING":
            self._record("resized", workers=current_state.scaling_decision.num_workers)
        elif name == "FINISHED":
            self._record("finished")

    def after_controller_finish(self, result: Any) -> None:
        """Wait for what is still to be written, but not for ever."""
        try:
            if self._last is not None:
                self._last.result(60)
        except TimeoutError:
            logger.warning("%s: the last events could not be written in 60 s", self._url)

    def _record(self, event: str, **more: Any) -> None:
        line = json.dumps(
            {"time": round(time.time(), 3), "event": event, "workers": self._workers} | more
        )
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="events")
        self._last = self._pool.submit(self._write, line)

    def _write(self, line: str) -> None:
        self._unwritten.append(line)
        try:
            if self._lines is None:
                self._lines = read_lines(self._url)
            storage.put_bytes(
                self._url, "".join(f"{one}\n" for one in self._lines + self._unwritten).encode()
            )
        except OSError as error:
            logger.warning("events are kept for the next attempt: %s", error)
            return
        self._lines, self._unwritten = self._lines + self._unwritten, []


class Recovery(ControllerCallback):
    """Makes Ray Train's controller recover quickly, and give up where the run makes no progress.

    Failures are counted in a row: a new checkpoint between two of them starts the count afresh. So a run of weeks
    survives any number of faults, and an error that comes back each time ends it after `max_failures` restarts.
    """

    def __init__(self, run_dir: str, max_failures: int, *, elastic: bool) -> None:
        self._checkpoints = storage.join(run_dir, "checkpoints")
        self._requester_url = storage.join(run_dir, "ray", "requester")
        self._max_failures = max_failures
        self._elastic = elastic
        self._in_a_row = 0
        self._newest_step = -1
        self._requester = ""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ray passes most of TIMINGS on from the driver, but not the one that it reads here."""
        for name, value in TIMINGS.items():
            os.environ.setdefault(name, value)
        self._requester = f"train-{train_run_context.run_id}"
        self._release_predecessor()

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Count a failure, and look at the cluster anew before the size of the next group is decided."""
        if current_state is previous_state:
            time.sleep(
                0.5
            )  # no room for the least number of workers; Ray's controller would ask without a pause
        elif state_name(current_state) == "RESTARTING":
            self._count(current_state.training_failed_error)
        if self._elastic and state_name(current_state) in ("RESTARTING", "RESCHEDULING"):
            self._look_at_the_cluster()

    def _count(self, error: BaseException) -> None:
        deaths = [
            getattr(one, "health_check_failure", one)
            for one in getattr(error, "worker_failures", {}).values()
        ]
        if isinstance(error, PreemptionError) or any(
            getattr(one, "preempted", False) for one in deaths
        ):
            return
        try:
            newest = max((one.step for one in find_committed(self._checkpoints)), default=-1)
        except OSError as trouble:
            logger.warning("counting a failure without knowing the newest checkpoint: %s", trouble)
            newest = self._newest_step
        self._in_a_row = self._in_a_row + 1 if newest <= self._newest_step else 1
        self._newest_step = max(newest, self._newest_step)
        if 0 <= self._max_failures < self._in_a_row:
            raise TrainingFailedError(root_cause(error))

    def _release_predecessor(self) -> None:
        """A controller that was killed with its driver leaves a reservation of the workers' CPUs for up to 180 s."""
        try:
            for requester in read_lines(self._requester_url):
                ask_coordinator("cancel_request", requester)
            storage.put_bytes(self._requester_url, self._requester.encode())
        except OSError as error:
            logger.warning(
                "a killed driver's reservation may hold up this run for three minutes: %s", error
            )

    def _look_at_the_cluster(self) -> None:
        """Ray's coordinator sees nodes come and go every 20 s only; a group sized by what it saw would wait."""
        ask_coordinator("get_reserved_resources", self._requester, recompute=True)


def ask_coordinator(what: str, requester: str, **more: Any) -> None:
    """Call a method of the actor that shares the cluster's resources out among training runs, and wait for it."""
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    try:
        ray.get(
            getattr(get_or_create_autoscaling_coordinator(), what).remote(requester, **more),
            timeout=5,
        )
    except ray.exceptions.RayError as error:
        logger.warning(
            "the coordinator did not answer; the next group may be of the wrong size: %s", error
        )


def state_name(state: Any) -> str:
    """The name of a state of Ray Train's controller, e.g. RUNNING."""
    return state._state_type.state_name


def failure_of(state: Any) -> BaseException | None:
    """The error that brought Ray Train's controller into `state`."""
    return getattr(getattr(state, "next_state", state), "training_failed_error", None)


def read_lines(url: str) -> list[str]:
    """The lines of a text file in storage; none where there is no file."""
    try:
        return storage.read_bytes(url).decode().splitlines()
    except FileNotFoundError:
        return []


def root_cause(error: BaseException) -> str:
    """The worker's own error behind a Ray failure: of the first rank that did not just lose its peers."""
    if isinstance(error, ControllerError):
        return one_line(error.controller_failure)
    failures = dict(sorted((getattr(error, "worker_failures", None) or {}).items()))
    messages = {rank: one_line(failure) for rank, failure in failures.items()}
    own = {
        rank: text for rank, text in messages.items() if not any(sign in text for sign in LOST_PEER)
    } or messages
    return "; ".join(f"worker {rank}: {text}" for rank, text in list(own.items())[:1]) or one_line(
        error
    )


def one_line(failure: BaseException) -> str:
    """The innermost cause of an error, in one line."""
    innermost = getattr(failure, "health_check_failure", failure)
    while (cause := getattr(innermost, "cause", None) or innermost.__cause__) is not None:
        innermost = cause
    if isinstance(innermost, ray.exceptions.ActorDiedError | ray.exceptions.ActorUnavailableError):
        return "its process died"
    lines = [line.strip() for line in str(innermost).strip().splitlines() if line.strip()]
    if type(innermost).__name__ in (
        "WorkerHealthCheckTimeoutError",
        "WorkerGroupStartupTimeoutError",
    ):
        return lines[0].partition(" Potential causes")[0]
    return lines[-1] if lines else type(innermost).__name__
