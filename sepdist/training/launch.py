"""Ray Train: a frozen run in, the same loop in N workers out; a worker that dies is replaced and the run goes on.

The worker function only joins the process group that Ray made and calls `loop.train`; checkpoints are the run's own
(checkpoint.py), so Ray's storage holds no more than its own bookkeeping.
"""

import logging
import math
import os
from typing import Any

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from sepdist import storage
from sepdist.cluster import connected
from sepdist.config import TrainConfig


class TrainingFailedError(RuntimeError):
    """The workers failed more often than `cluster.max_failures` allows; the message is the last worker's own error."""


def launch(cfg: TrainConfig) -> None:
    """Train the run frozen at `cfg.run_dir` in Ray Train workers; returns when it has finished.

    Raises:
        TrainingFailedError: a worker's error, once the allowed restarts are used up.
    """
    # A worker that dies is noticed after this long; a kill just before it would lose what Ray had not polled yet.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "5")
    needed = math.ceil(cfg.cluster.num_workers * cfg.cluster.cpus_per_worker)
    with connected(needed, address=cfg.cluster.address, verbose=cfg.cluster.verbose):
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"config": storage.join(cfg.run_dir, "config.yaml")},
            scaling_config=ScalingConfig(
                num_workers=cfg.cluster.num_workers,
                use_gpu=cfg.cluster.use_gpu,
                resources_per_worker={"CPU": cfg.cluster.cpus_per_worker}
                | ({"GPU": 1.0} if cfg.cluster.use_gpu else {}),
            ),
            torch_config=TorchConfig(
                backend="nccl" if cfg.cluster.use_gpu else "gloo", timeout_s=cfg.cluster.collective_timeout_seconds
            ),
            run_config=RunConfig(  # type: ignore[call-arg]  # mypy sees the class of Ray Train v1
                name="ray",
                storage_path=cfg.run_dir,
                failure_config=FailureConfig(max_failures=cfg.cluster.max_failures),
                worker_runtime_env={"env_vars": worker_environment(cfg)},
            ),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise TrainingFailedError(root_cause(error)) from error


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
    from sepdist import config
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
    loop.train(config.load_frozen(arguments["config"]), world, report=ray.train.report)


def root_cause(error: BaseException) -> str:
    """The worker's own error behind a Ray failure: of the first rank that did not just lose its peers."""
    failures = dict(sorted((getattr(error, "worker_failures", None) or {}).items()))
    messages = {rank: _last_line(failure) for rank, failure in failures.items()}
    own = {rank: text for rank, text in messages.items() if "Connection closed by peer" not in text} or messages
    return "; ".join(f"worker {rank}: {text}" for rank, text in list(own.items())[:1]) or str(error)


def _last_line(failure: BaseException) -> str:
    innermost = failure
    while (cause := getattr(innermost, "cause", None) or innermost.__cause__) is not None:
        innermost = cause
    lines = [line for line in str(innermost).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(innermost).__name__
