"""A connection to Ray: a number of CPUs in, this job's cluster or a small Ray of this machine out."""

import contextlib
import logging
import os
from collections.abc import Iterator


@contextlib.contextmanager
def connected(num_cpus: int, *, address: str | None = None, verbose: bool = False) -> Iterator[None]:
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
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
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
