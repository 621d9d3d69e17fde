"""Run the programs on tiny settings in processes of their own, and read what they leave behind.

For tests and benchmarks.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp

from sepdist import composing, config, storage
from sepdist.reporting import read_metrics
from sepdist.training.checkpoint import find_committed

ROOT = Path(__file__).parent.parent.parent
TINY = [
    "model.num_filters=16",
    "model.num_bottleneck=8",
    "model.num_hidden=12",
    "model.num_skip=8",
    "model.num_blocks=2",
    "model.num_repeats=1",
    "model.compile=false",
    "data.crop_seconds=0.5",
    "data.micro_batch=1",
    "data.num_virtual_shards=4",
    "validation.num_mixtures=3",
    "validation.num_listening=0",  # a spectrogram takes a second
    "optim.lr=0.002",
    "schedule.decay_steps=0",  # so that runs cut short by max_steps have the same rates
    "training.log_every=1",
]


@contextlib.contextmanager
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Yield a function that starts a command; what still runs at the end is killed."""
    running: list[subprocess.Popen[str]] = []

    def start(*command: str, **options: Any) -> subprocess.Popen[str]:
        running.append(subprocess.Popen(command, text=True, **options))
        return running[-1]

    try:
        yield start
    finally:
        for process in running:
            process.kill()
            process.communicate()


def program(*arguments: str, expect: int = 0, timeout: float = 300, **environment: str) -> str:
    """Run `python arguments...` as a user would, check its exit status and return its output."""
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == expect, done.stdout[-6000:]
    return done.stdout


def train_arguments(
    experiment: str,
    data: dict[str, str],
    run_dir: object,
    *more: str,
    settings: Sequence[str] = TINY,
) -> list[str]:
    places = [f"data.train={data['train']}", f"data.validation={data['dev']}", f"run_dir={run_dir}"]
    return ["-m", "sepdist", "train", f"experiment={experiment}", *places, *settings, *more]


def frozen(
    data: dict[str, str],
    run_dir: Path,
    *more: str,
    settings: Sequence[str] = TINY,
    experiment: str = "demo/finetune",
) -> str:
    """Write the frozen config of a run without initial weights; returns its path, for `loop`."""
    overrides = [
        f"experiment={experiment}",
        "init.weights=null",
        "init.reinit=[]",
        f"data.train={data['train']}",
        f"data.validation={data['dev']}",
        f"run_dir={run_dir}",
        *settings,
        *more,
    ]
    composed = composing.compose("train", overrides, config.TrainConfig)
    cfg = config.typed(composed, config.TrainConfig)
    path = run_dir / "config.yaml"
    run_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(config.to_yaml(cfg))
    return str(path)


def upload(data: dict[str, str], prefix: str) -> dict[str, str]:
    """Copy data sets to object storage; returns their urls there, by split."""
    urls = {split: storage.join(prefix, split) for split in data}
    for split, folder in data.items():
        for path in (one for one in Path(folder).rglob("*") if one.is_file()):
            name = storage.join(urls[split], *path.relative_to(folder).parts)
            storage.put_bytes(name, path.read_bytes())
    return urls


def loop(path: str) -> None:
    """Run the training loop on a frozen config, in one process without Ray.

    The process is forked from multiprocessing's server, which has torch and DeepSpeed imported
    (see conftest.py), so that it starts at once.
    """
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}  # the server has that of its own start
    mp.start_processes(_train_alone, (path, environment), start_method="forkserver")


def _train_alone(rank: int, path: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    from sepdist.training.loop import train
    from sepdist.training.world import join_world

    train(config.load_frozen(path), join_world())
    dist.destroy_process_group()


def history(run_dir: object) -> dict[int, float]:
    return {
        row["step"]: row["loss/total"] for row in read_metrics(str(run_dir)) if "loss/total" in row
    }


def final_hash(run_dir: object) -> str:
    return final_files(run_dir)[0]


def final_files(run_dir: object) -> tuple[str, str]:
    """The sha256 of the weights and of the optimizer state in the newest checkpoint."""
    files = find_committed(storage.join(str(run_dir), "checkpoints"))[-1].files
    return files["model.safetensors"]["sha256"], files["optimizer.safetensors"]["sha256"]
