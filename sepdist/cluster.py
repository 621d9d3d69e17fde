"""A connection to Ray: a number of CPUs in, this job's cluster or a small Ray of this machine out."""

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
    """Be connected to Ray inside: to `address`, to RAY_ADDRESS (as `ray job submit` sets it), or to a Ray started here.

    One started here counts at least `num_cpus` logical CPUs, so that more workers than cores may share the machine;
    `verbose` shows its processes' output. A connection that was there before is used and left alone.
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
        # Ray protects a local cluster by a token of its own accord, and says so each time.
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(
            logging.ERROR
        )
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
    """Run the generator `work` on each of `calls`, one Ray task per call; yields items as they come.

    A task whose worker dies is run again, up to three times.

    Raises:
        ConfigError: `num_gpus` per task are asked for and no node has a GPU.
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
