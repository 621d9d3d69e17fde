"""Connect to Ray, the job's cluster or a small one on this machine, and run tasks on it."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from sepdist.config import ConfigError


@contextlib.contextmanager
def connected(
    num_cpus: int, *, address: str | None = None, verbose: bool = False
) -> Iterator[None]:
    """Connect to `address`, to RAY_ADDRESS (which `ray job submit` sets), or to a Ray started here.

    A Ray started here has at least `num_cpus` logical CPUs, so that more workers than cores can
    share the machine; `verbose` shows its processes' output. An existing connection is reused.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, logging_level=logging.WARNING)
    else:
        # It announces every time that Ray protects a local cluster by a token.
        announcer = "ray._private.authentication.authentication_token_setup"
        logging.getLogger(announcer).setLevel(logging.ERROR)
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, num_cpus),
            include_dashboard=False,
            object_store_memory=200_000_000,  # nothing large goes through it
            logging_level=logging.ERROR,
            # Without a dashboard Ray's own actors complain to the driver every second.
            log_to_driver=verbose,
        )
    try:
        yield
    finally:
        ray.shutdown()


def run_tasks(
    work: Callable[..., Iterator[Any]], calls: Sequence[tuple[Any, ...]], *, num_gpus: float = 0.0
) -> Iterator[Any]:
    """Run the generator `work` on each of `calls` as a Ray task; yields items as they come.

    A task whose worker dies is run again, up to three times.

    Raises:
        ConfigError: tasks need `num_gpus`, and no node has a GPU.
        ValueError, OSError: as `work` raised them.
    """
    import ray
    from ray.exceptions import RayTaskError

    with connected(len(calls)):
        if num_gpus and not ray.cluster_resources().get("GPU"):  # the tasks would wait forever
            raise ConfigError("use_gpu=true, but no node of this Ray cluster has a GPU")
        task = ray.remote(num_cpus=1, num_gpus=num_gpus, max_retries=3)(work)
        streams: list[Any] = [task.options(num_returns="streaming").remote(*call) for call in calls]
        try:
            while streams:
                [stream], _ = ray.wait(streams, num_returns=1)
                reference = next(cast(Iterator[Any], stream), None)
                if reference is None:
                    streams.remove(stream)
                    continue
                yield ray.get(reference)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, ValueError | OSError) else error from None
        finally:
            for stream in streams:
                ray.cancel(stream)
