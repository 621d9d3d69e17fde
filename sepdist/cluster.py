"""Connect to Ray, this job's cluster or a small one on this machine, and run tasks in it."""

import contextlib
import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, cast

from sepdist.config import ConfigError
from sepdist.console import Stopped
from sepdist.slots import named_plugins, use_plugins

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def connected(
    num_cpus: int, *, address: str | None = None, verbose: bool = False
) -> Iterator[None]:
    """Connect to `address`, to RAY_ADDRESS (set by `ray job submit`) or to a Ray started here.

    A Ray started here has at least `num_cpus` logical CPUs, so that more workers than cores can
    share the machine; `verbose` shows its processes' output. An open connection stays in use. If
    Ray does not answer, three times, it is an OSError.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        _start(address=address, logging_level=logging.WARNING)
    else:
        # Ray protects a local cluster by a token and logs that every time.
        chatty = "ray._private.authentication.authentication_token_setup"
        logging.getLogger(chatty).setLevel(logging.ERROR)
        # Ray starts workers by a shell command, in which it does not quote the path of Python.
        python = shlex.quote(sys.executable)
        _start(
            address="local",
            runtime_env={"py_executable": python} if python != sys.executable else None,
            num_cpus=max(os.cpu_count() or 1, num_cpus),
            include_dashboard=False,
            object_store_memory=200_000_000,  # nothing large goes through it
            logging_level=logging.ERROR,
            # Without a dashboard Ray's own actors log errors to the driver every second.
            log_to_driver=verbose,
        )
    try:
        yield
    finally:
        ray.shutdown()


def _start(**options: Any) -> None:
    import ray

    on_term = signal.getsignal(signal.SIGTERM)
    for attempt in (1, 2, 3):
        try:
            ray.init(**options)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_term)  # Ray's own exits with another status
            return
        except SystemExit as error:  # so Ray's own handler answers SIGTERM
            raise Stopped(signal.SIGTERM) from error
        except Exception as error:  # of a start-up time-out Ray raises no narrower class
            ray.shutdown()
            where, text = options["address"], " ".join(str(error).split()) or type(error).__name__
            if attempt == 3:
                raise OSError(f"Ray at {where!r} did not answer: {text}") from error
            logger.warning("Ray at %r did not answer, trying again: %s", where, text)


def check_room(workers: int, each: Mapping[str, float], setting: str) -> int:
    """Return how many workers that take `each` (amounts by resource) the cluster has room for.

    Fewer than `workers` is a ConfigError in a Ray started here. Another cluster may grow: then the
    log says what is waited for.
    """
    import ray
    from ray._private import worker

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = [[int(one.get(k, 0) / v + 1e-6) for k, v in each.items() if v] for one in nodes]
    room = sum(min(counts, default=workers) for counts in fits)
    if room < workers:
        needs = ", ".join(f"{v:g} {k}" for k, v in each.items() if v)
        has = ", ".join(f"{sum(one.get(k, 0) for one in nodes):g} {k}" for k in each)
        text = f"{setting}: each worker needs {needs}; Ray has {has} on {len(nodes)} node(s), "
        text += f"room for {room} of {workers}"
        if worker._global_node.is_head():  # type: ignore[attr-defined]
            raise ConfigError(text)
        logger.warning("%s; waiting until nodes join (Ctrl-C ends it)", text)
    return room


def run_tasks(
    work: Callable[..., Iterator[Any]],
    calls: Sequence[tuple[Any, ...]],
    num_workers: int,
    num_gpus: float = 0.0,
) -> Iterator[Any]:
    """Run the generator `work` on each of `calls`, one Ray task per call; yield items as they come.

    At most `num_workers` tasks run at a time: 0 is none, all runs in this process, and -1 is one
    per CPU of the cluster. A task whose worker dies is run again, up to three times, after which it
    is an OSError. ValueError and OSError come through as `work` raised them; ConfigError if no task
    fits on a node.
    """
    if num_workers == 0:
        for call in calls:
            yield from work(*call)
        return
    import ray
    from ray.exceptions import RayTaskError, WorkerCrashedError

    waiting = iter(calls)
    with connected(num_workers):
        room = check_room(1, {"CPU": 1, "GPU": num_gpus}, f"num_workers={num_workers}")
        if num_workers == -1:
            num_workers = max(1, room)
        if 0 < room < num_workers:
            logger.warning("num_workers=%d: this Ray runs %d of them at a time", num_workers, room)
        task = ray.remote(num_cpus=1, num_gpus=num_gpus, max_retries=3)(_run_in)
        task = task.options(name=work.__name__, num_returns="streaming")

        def start(count: int) -> list[Any]:
            place = os.getcwd(), named_plugins()
            return [task.remote(*place, work, *call) for call in islice(waiting, count)]

        streams = start(num_workers)
        try:
            while streams:
                [stream], _ = ray.wait(streams, num_returns=1)
                reference = next(cast(Iterator[Any], stream), None)
                if reference is None:
                    streams.remove(stream)
                    streams += start(1)
                else:
                    yield ray.get(reference)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, ValueError | OSError) else error from None
        except WorkerCrashedError as error:
            todo = "the same command starts again"
            raise OSError(f"a worker died more than three times ({error}); {todo}") from error
        finally:
            for stream in streams:
                ray.cancel(stream)


def _run_in(
    folder: str, plugins: list[str], work: Callable[..., Iterator[Any]], *call: Any
) -> Iterator[Any]:
    """Run `work` with the driver's plug-ins, in its folder, the base of relative paths."""
    if os.path.isdir(folder):
        os.chdir(folder)
    use_plugins(plugins)
    yield from work(*call)
