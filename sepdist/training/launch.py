"""Run the training loop in Ray Train workers, and replace workers that die.

A worker joins the process group that Ray made and calls `loop.train`. Checkpoints are the run's
own (checkpoint.py); Ray's storage holds its bookkeeping only. The controller writes
run_dir/events.jsonl.

TIMINGS bounds the time that a fault may take; docs/training.md has what was measured. The callbacks
use private hooks of Ray Train, so Ray is pinned to a minor version.
"""

import contextlib
import logging
import math
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import psutil
import ray
import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.exceptions import ControllerError, PreemptionError
from ray.util.metrics import Counter, Gauge

from sepdist import config, slots, storage
from sepdist.cluster import check_room, connected
from sepdist.config import ConfigError, TrainConfig
from sepdist.console import Stopped, signals_to
from sepdist.reporting import to_json
from sepdist.training.checkpoint import find_committed
from sepdist.training.schedule import NO_SCORE
from sepdist.training.stopping import StopRequest

logger = logging.getLogger(__name__)

TIMINGS = {
    # How often the controller looks at its workers; Ray's 2 s only delay the recovery.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # A worker whose main thread does not answer for this long counts as hung; Ray's default is 10
    # minutes. Training runs in another thread, which holds the GIL for at most about a second at a
    # time (imports, a large pickle): compilation is Python or runs in a process of its own.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "20",
    # How long a group whose worker is stopped or unreachable may take to shut down; Ray's is 30 s.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "1",
    # Clouds give between 30 s (a pod, Google) and 120 s (AWS) of notice.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
}
# An elastic group that does not get the room it was promised asks again after this time, because
# the promise may predate the loss of a node. A group of fixed size keeps Ray's 60 s.
ELASTIC_START_SECONDS = "10"
gauge = cache(Gauge)  # one for each name
# gloo's errors for a peer that died.
LOST_PEER = ("Connection closed by peer", "Connection reset by peer")


class TrainingFailedError(RuntimeError):
    """The workers failed more than `cluster.max_failures` times; says the last one's own error."""


def launch(
    cfg: TrainConfig, request: StopRequest, say: Callable[[str], object] = logger.warning
) -> None:
    """Train the run frozen at `cfg.run_dir` in Ray Train workers; returns when it has finished.

    TrainingFailedError once the restarts are used up; Stopped after a signal that `request`
    handles. `say` gets what the user should know meanwhile.
    """
    cluster = cfg.cluster
    fewest, most = config.worker_range(cluster)
    os.environ.update(TIMINGS | os.environ)
    if fewest < most:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", ELASTIC_START_SECONDS)
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": 1.0} if cluster.use_gpu else {})
    # The ignored types: mypy sees the classes of Ray Train v1.
    scaling = ScalingConfig(
        num_workers=most if fewest == most else (fewest, most),  # type: ignore[arg-type]
        elastic_resize_monitor_interval_s=cluster.elastic_check_seconds,  # type: ignore[call-arg]
        use_gpu=cluster.use_gpu,
        resources_per_worker=resources,
    )
    recovery = Recovery(cfg.run_dir, elastic=fewest < most)
    needed = math.ceil(most * cluster.cpus_per_worker)
    with connected(needed, address=cluster.address, verbose=cluster.verbose):
        cpus = f"cluster.cpus_per_worker={cluster.cpus_per_worker:g}"
        check_room(fewest, resources, f"cluster.num_workers={cluster.num_workers}, {cpus}")
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        actor: Any = ray.remote(num_cpus=0, label_selector=here)
        flag = actor(StopFlag).remote()
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={
                "config": storage.join(cfg.run_dir, "config.yaml"),
                "plugins": slots.named_plugins(),
                "stop": flag,
            },
            scaling_config=scaling,
            torch_config=TorchConfig(
                backend="nccl" if cluster.use_gpu else "gloo",
                timeout_s=cluster.collective_timeout_seconds,
            ),
            run_config=RunConfig(  # type: ignore[call-arg]
                name="ray",
                storage_path=cfg.run_dir,
                worker_runtime_env={"env_vars": worker_environment(cfg)},
                callbacks=[EventLog(cfg.run_dir, cfg.name), recovery],  # type: ignore[list-item]
            ),
        )
        policy = {"failure_policy": FailureLimit(cfg.run_dir, cluster.max_failures)}  # no option
        run = trainer._initialize_and_run_controller  # type: ignore[attr-defined]
        vars(trainer)[run.__name__] = lambda **parts: run(**(parts | policy))
        try:
            with stopping(trainer, flag, request, cluster.stop_seconds, say):
                trainer.fit()
        finally:
            vars(trainer).clear()  # it refers to itself, which would keep Ray's actors until exit


@contextlib.contextmanager
def stopping(
    trainer: Any, flag: Any, request: StopRequest, seconds: float, say: Callable[[str], object]
) -> Iterator[None]:
    """Answer signals while `trainer` runs.

    The first has its workers commit a checkpoint, the second, or the end of `seconds`, ends the run
    at once. Ray Train's own handler knows Ctrl-C only and ends with status 0.
    """
    controllers: list[Any] = []
    trainer._register_sigint_handler = controllers.append

    def ask() -> None:
        flag.mark.remote("asked")
        signal.setitimer(signal.ITIMER_REAL, seconds)
        name = signal.Signals(request.number).name
        say(f"{name}: committing a checkpoint, for {seconds:g} s at most; again ends at once")

    request.first = ask
    try:
        with signals_to(request.heard, signal.SIGALRM):
            yield
        if request.number and ray.get(flag.has.remote("stopped")):
            raise Stopped(request.number)
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        if request.number:  # the signal may have reached the workers too
            raise Stopped(request.number) from None
        raise TrainingFailedError(root_cause(error)) from error
    except (KeyboardInterrupt, ConfigError):
        with contextlib.suppress(ray.exceptions.RayError):
            for controller in controllers:
                ray.get(controller.abort.remote(), timeout=5)
        raise
    finally:
        request.first = None
        signal.setitimer(signal.ITIMER_REAL, 0)


class StopFlag:
    """An actor beside the driver, which asks its workers to stop; they say that they have."""

    def __init__(self) -> None:
        self._marks = set[str]()

    def mark(self, what: str) -> None:
        """Set "asked" or "stopped"."""
        self._marks.add(what)

    def has(self, what: str) -> bool:
        """Return whether it is set."""
        return what in self._marks


def stop_request(flag: Any) -> Callable[[], bool]:
    """Return a function that says whether the driver asked to stop, which a thread looks after."""
    asked = threading.Event()

    def watch() -> None:
        while not asked.is_set():
            try:
                if ray.get(flag.has.remote("asked"), timeout=10):
                    asked.set()
            except ray.exceptions.GetTimeoutError:
                continue
            except ray.exceptions.RayError:  # the driver is gone, and this worker soon
                return
            time.sleep(1.0)

    threading.Thread(target=watch, daemon=True).start()
    return asked.is_set


def worker_environment(cfg: TrainConfig) -> dict[str, str]:
    """Return the environment of the workers, without credentials: their machines have those."""
    environment = {"OMP_NUM_THREADS": str(cfg.cluster.threads_per_worker)}
    environment |= {"RAY_CHDIR_TO_TRIAL_DIR": "0", "PYTHONWARNINGS": "ignore"}
    return environment if cfg.cluster.use_gpu else environment | {"DS_ACCELERATOR": "cpu"}


def train_worker(arguments: dict[str, Any]) -> None:
    """Train in this Ray Train worker."""
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
    slots.use_plugins(arguments["plugins"])
    cfg = config.load_frozen(arguments["config"])
    flag, publish_all = arguments["stop"], partial(publish, cfg.name)
    asked = stop_request(flag) if world.is_main else lambda: False
    notice = preemption_notice()
    finished = loop.train(cfg, world, ray.train.report, notice, asked, publish_all)
    if not finished and world.is_main:
        ray.get(flag.mark.remote("stopped"))


def use_ray_network() -> None:
    """Let gloo and NCCL use the interface with Ray's address of this host, unless told another.

    gloo's own choice is the address of the host's name, which Debian and Ubuntu set to 127.0.1.1.
    """
    found = {one[4][0] for one in socket.getaddrinfo(ray.util.get_node_ip_address(), None)}
    for name, addresses in psutil.net_if_addrs().items():
        if found & {one.address.partition("%")[0] for one in addresses}:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # eth1 would mean eth10, too
            return


def publish(run: str, metrics: Mapping[str, float]) -> None:
    """Export metrics by Ray, loss/total as ray_sepdist_loss_total with the tag `run`, and so on."""
    for name, value in metrics.items():
        gauge("sepdist_" + re.sub(r"\W", "_", name), name, ("run",)).set(value, {"run": run})


def preemption_notice() -> Callable[[], bool]:
    """Return a function that is true once per notice that a node of this group will be taken away.

    Every rank gets the same answer, as Ray returns what rank 0 knows and repeats it until the end.
    """
    known: Any = None

    def preempted() -> bool:
        nonlocal known
        before, known = known, ray.train.get_preemption_info()
        return known is not None and known != before

    return preempted


class EventLog(WorkerGroupCallback, ControllerCallback):
    """Writes run_dir/events.jsonl in Ray Train's controller, which outlives the workers.

    Each line is an object with `time` (Unix seconds), `event` ("started", "failed", "resized" or
    "finished"), `workers` (their number; of "resized" the new one) and, for "failed", `error`. A
    later start of the run continues the file. It is rewritten whole in a thread of its own, so that
    a storage outage never delays a recovery; events not written go out with the next one.
    """

    def __init__(self, run_dir: str, run: str = "") -> None:
        self._url = storage.join(run_dir, "events.jsonl")
        self._run = run
        self._before: list[str] | None = None  # lines of earlier starts
        self._lines: list[str] = []
        self._workers = 0
        self._seen: BaseException | None = None
        self._pool: ThreadPoolExecutor | None = None  # made in the controller: it cannot be pickled
        self._last: Future[None] | None = None

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """Record that the workers train."""
        self._workers = len(worker_group)
        self._record("started")

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Record a failure, a resize or the end of the run."""
        cause = getattr(current_state, "next_state", current_state)
        error = getattr(cause, "training_failed_error", None)
        if error is not None and error is not self._seen and not no_room(error):
            self._seen = error
            Counter("sepdist_restarts", "failures", ("run",)).inc(1.0, {"run": self._run})
            self._record("failed", error=root_cause(error))
        name = current_state._state_type.state_name
        if name == "RESIZING":
            self._record("resized", workers=current_state.scaling_decision.num_workers)
        elif name == "FINISHED":
            self._record("finished")

    def after_controller_finish(self, result: Any) -> None:
        """Wait up to 60 s for the last events to be written."""
        try:
            if self._last is not None:
                self._last.result(60)
        except TimeoutError:
            logger.warning("%s: the last events could not be written in 60 s", self._url)

    def _record(self, event: str, **more: Any) -> None:
        values = {"time": round(time.time(), 3), "event": event, "workers": self._workers} | more
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="events")
        self._last = self._pool.submit(self._write, to_json(values))

    def _write(self, line: str) -> None:
        self._lines.append(line)
        try:
            if self._before is None:
                self._before = read_lines(self._url)
            text = "\n".join([*self._before, *self._lines, ""])
            storage.put_bytes(self._url, text.encode())
        except OSError as error:
            logger.warning("events will be written with the next one: %s", error)


class Group(WorkerGroup):
    """Ray's workers, which use Ray's network and leave none behind when they fail to start."""

    def _init_train_context(self, workers: Any, sync_actor: Any) -> None:
        ray.get([worker.execute_async(use_ray_network) for worker in workers])
        super()._init_train_context(workers, sync_actor)

    def _start(self) -> None:
        try:
            super()._start()
        except Exception:
            if self.has_started():  # else Ray has removed them
                self.get_worker_group_state().shutdown()
            raise


class Recovery(ControllerCallback):
    """Makes Ray Train's controller recover quickly."""

    def __init__(self, run_dir: str, *, elastic: bool) -> None:
        self._requester_url = storage.join(run_dir, "ray", "requester")
        self._elastic = elastic
        self._requester = ""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Set the timings, not all of which Ray passes on from the driver, and free stale CPUs.

        A controller that was killed with its driver leaves its workers' CPUs reserved for 180 s.
        """
        os.environ.update(TIMINGS | os.environ)
        TrainController.worker_group_cls = Group
        # It logs each error with its traceback; FailureLimit says it in one line.
        logging.getLogger(TrainController.__module__).setLevel(logging.CRITICAL)
        self._requester = f"train-{train_run_context.run_id}"
        try:
            for requester in read_lines(self._requester_url):
                ask_coordinator("cancel_request", requester)
            storage.put_bytes(self._requester_url, self._requester.encode())
        except OSError as error:
            late = "a killed driver's reservation may delay this run by three minutes"
            logger.warning("%s: %s", late, error)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Before an elastic group is sized, have Ray look at the cluster.

        Ray's coordinator notices nodes that come and go only every 20 s.
        """
        name = current_state._state_type.state_name
        if current_state is previous_state:
            time.sleep(0.5)  # no room for `fewest` workers; Ray would ask again without a pause
        if self._elastic and name in ("RESTARTING", "RESCHEDULING"):
            ask_coordinator("get_reserved_resources", self._requester, recompute=True)


class FailureLimit(FailurePolicy):
    """Lets Ray Train's controller start the workers again, and give up without progress.

    A failure is an error of running workers and one while they start. A new checkpoint resets the
    count. So a run of weeks survives any number of faults, and an error that repeats ends it after
    `max_failures` restarts. Preemptions and waiting for room do not count.
    """

    def __init__(self, run_dir: str, max_failures: int) -> None:
        self._checkpoints = storage.join(run_dir, "checkpoints")
        self._max_failures = max_failures
        self._in_a_row, self._newest_step, self._waiting = 0, -1, False

    def make_decision(self, training_failed_error: BaseException) -> FailureDecision:
        """Count the failure and decide."""
        known, self._waiting = self._waiting, no_room(training_failed_error)
        if self._waiting and not known:
            logger.warning("waiting for room in the cluster: %s", root_cause(training_failed_error))
        failures = getattr(training_failed_error, "worker_failures", {}).values()
        deaths = [getattr(one, "health_check_failure", one) for one in failures]
        preempted = any(getattr(one, "preempted", False) for one in deaths)
        if self._waiting or preempted or isinstance(training_failed_error, PreemptionError):
            return FailureDecision.RETRY
        try:
            newest = max((one.step for one in find_committed(self._checkpoints)), default=-1)
        except OSError as trouble:
            logger.warning("counting a failure without knowing the newest checkpoint: %s", trouble)
            newest = self._newest_step
        self._in_a_row = self._in_a_row + 1 if newest <= self._newest_step else 1
        self._newest_step = max(newest, self._newest_step)
        cause = root_cause(training_failed_error)
        logger.warning("failure %d in a row: %s", self._in_a_row, cause)
        give_up = NO_SCORE in cause or 0 <= self._max_failures < self._in_a_row
        return FailureDecision.RAISE if give_up else FailureDecision.RETRY


def no_room(error: BaseException | None) -> bool:
    """Whether a group of workers did not start because the cluster had no room for it."""
    return isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError)


def ask_coordinator(method: str, requester: str, **more: Any) -> None:
    """Call a method of the Ray actor that divides the cluster among runs, and wait for it."""
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator

    try:
        actor = default_autoscaling_coordinator.get_or_create_autoscaling_coordinator()
        ray.get(getattr(actor, method).remote(requester, **more), timeout=5)
    except ray.exceptions.RayError as error:
        logger.warning("Ray's coordinator does not answer, the next group may be small: %s", error)


def read_lines(url: str) -> list[str]:
    """Return the lines of a text file in storage; none if there is no file."""
    with contextlib.suppress(FileNotFoundError):
        return storage.read_bytes(url).decode().splitlines()
    return []


def root_cause(error: BaseException) -> str:
    """Return the error behind a Ray failure: of the first rank that did not just lose a peer."""
    if isinstance(error, ControllerError):
        return one_line(error.controller_failure)
    failures = sorted((getattr(error, "worker_failures", None) or {}).items())
    texts = [f"worker {rank}: {one_line(failure)}" for rank, failure in failures]
    own = [text for text in texts if not any(sign in text for sign in LOST_PEER)]
    return (own or texts or [one_line(error)])[0]


def one_line(failure: BaseException) -> str:
    """Return the innermost cause of an error in one line."""
    innermost = getattr(failure, "health_check_failure", failure)
    while (cause := getattr(innermost, "cause", None) or innermost.__cause__) is not None:
        innermost = cause
    if isinstance(innermost, ray.exceptions.ActorDiedError | ray.exceptions.ActorUnavailableError):
        return "its process died"
    kind = type(innermost).__name__
    lines = [line.strip() for line in str(innermost).splitlines()]
    lines = [one for one in lines if one and not one.startswith("Set TORCH")]  # torch's advice
    if kind in ("WorkerHealthCheckTimeoutError", "WorkerGroupStartupTimeoutError"):
        return lines[0].partition(" Potential causes")[0]
    return lines[-1] if lines else kind
