"""One training stage from the driver's side: freeze the config, launch the workers, follow their progress."""

import json
import os
import platform
import threading
from importlib.metadata import version
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sepdist import __version__, config, storage
from sepdist.config import ConfigError, TrainConfig
from sepdist.training.checkpoint import best_of, find_committed, read_file
from sepdist.training.handoff import inherit

# What may change between the first start of a run and a later one; anything else makes it another run.
# data_root: data.train and data.validation hold what came of it.
FREE_TO_CHANGE: tuple[str, ...] = ("training", "cluster", "validation", "engine.zero", "data_root")
FREE_TO_CHANGE += ("data.cache", "data.prefetch", "data.num_threads")


def run(cfg: TrainConfig, console: Console) -> None:
    """Freeze a stage, train it in Ray Train workers and show how it goes; returns when it has finished.

    Raises:
        TrainingFailedError: a worker's error, once the allowed restarts are used up.
    """
    from sepdist.training import launch

    cfg = freeze(cfg, console)
    console.print(f"run {cfg.name}: {cfg.run_dir}")
    with follow(cfg, console):
        launch.launch(cfg)
    summarise(cfg, console)


def freeze(cfg: TrainConfig, console: Console) -> TrainConfig:
    """Check the config as far as it can be without a worker, and put it at run_dir/config.yaml.

    Raises:
        ConfigError: a part does not build, a data set is missing, or run_dir holds a run of another config.
    """
    _make_absolute(cfg)
    from sepdist.training.datasets import open_datasets
    from sepdist.training.engine import check_engine_options, refuse_slow_bf16

    options = dict(cfg.engine)
    workers_here = not (cfg.cluster.use_gpu or cfg.cluster.address or os.environ.get("RAY_ADDRESS"))
    if workers_here and options.get("precision") == "bf16" and not options.get("allow_slow_bf16"):
        refuse_slow_bf16()
    fewest, most = config.worker_range(cfg.cluster)
    for world_size in (most, *range(fewest, most)):  # an elastic run may come to any of them
        check_engine_options(
            options.get("zero_stage", 0),
            options.get("precision", "fp32"),
            options.get("reduction", "canonical"),
            cfg.data.num_virtual_shards,
            world_size,
        )
    if cfg.cluster.preemption_check_steps < 1:
        raise ConfigError(
            f"cluster.preemption_check_steps={cfg.cluster.preemption_check_steps}: at least 1"
        )
    objective = config.build(cfg.objective)
    model = config.build(cfg.model)
    if hasattr(objective, "check_model"):
        objective.check_model(model)
    feeds, _ = open_datasets(cfg)
    if absent := set(getattr(objective, "data_sets", ())) - feeds.keys():
        raise ConfigError(
            f"objective {cfg.objective['_target_']} needs data.extra of the name {', '.join(absent)}"
        )
    if cfg.init.weights:
        fresh, parent = inherit(model, cfg.init)
        console.print(
            f"weights from {parent['url']}; re-initialised: {', '.join(fresh) or 'none'}",
            highlight=False,
            soft_wrap=True,
        )
    frozen = storage.join(cfg.run_dir, "config.yaml")
    text = config.to_yaml(cfg)
    if storage.exists(frozen):
        before = config.to_yaml(
            config.load_frozen(frozen)
        )  # with the defaults of keys that are younger than the run
        changed = config.differences(yaml.safe_load(before), yaml.safe_load(text), FREE_TO_CHANGE)
        if changed:
            raise ConfigError(
                f"{cfg.run_dir} holds a run of another config: {'; '.join(changed)}. Choose another run_dir (or name), "
                "or remove the old run"
            )
    storage.put_bytes(frozen, text.encode())
    environment = {
        name: version(name) for name in ("torch", "ray", "deepspeed", "webdataset", "numpy")
    }
    environment |= {
        "sepdist": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    storage.put_bytes(
        storage.join(cfg.run_dir, "environment.json"), json.dumps(environment, indent=1).encode()
    )
    return cfg


def _make_absolute(cfg: TrainConfig) -> None:
    """Workers have another working directory, so local paths are made absolute here."""
    places = [(vars(cfg), "run_dir"), (vars(cfg.data), "train"), (vars(cfg.data), "validation")]
    places += [
        (vars(cfg.init), "weights"),
        (cfg.objective, "labels"),
        (cfg.data.mixing or {}, "noise"),
    ]
    places += [(cfg.objective.get("judge", {}), "url")]
    for fields, name in [*places, *((vars(one), "url") for one in cfg.data.extra)]:
        if (value := fields.get(name)) and not storage.is_remote(value):
            fields[name] = str(Path(value).expanduser().resolve())


class follow:  # noqa: N801 - a context manager used as a verb
    """A progress bar over the run, fed from its metrics.jsonl while the workers write it."""

    def __init__(self, cfg: TrainConfig, console: Console) -> None:
        self.path = storage.join(cfg.run_dir, "metrics.jsonl")
        self.total = cfg.training.max_steps
        self.last_validation = -1
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
            console=console,
        )
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "follow":
        self.progress.start()
        self.task = self.progress.add_task(
            os.path.basename(self.path.rsplit("/", 1)[0]), total=self.total, state=""
        )
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stopped.set()
        self.thread.join()
        self._show()
        self.progress.stop()

    def _watch(self) -> None:
        seconds = 5.0 if storage.is_remote(self.path) else 1.0
        while not self.stopped.wait(seconds):
            self._show()

    def _show(self) -> None:
        try:
            rows = [json.loads(line) for line in storage.read_bytes(self.path).splitlines()]
        except (OSError, ValueError):
            return  # not written yet, or caught in the middle of a line: the next look sees it
        shown: dict[str, float] = {}
        for row in rows[-8:]:
            shown |= row
        for row in rows:
            if "validation/loss" in row and row["step"] > self.last_validation:
                self.last_validation = row["step"]
                values = "  ".join(
                    f"{k} {v:.2f}"
                    for k, v in row.items()
                    if k.startswith("validation/") and v is not None
                )
                self.progress.console.print(
                    f"step {row['step']}  {values}", highlight=False, soft_wrap=True
                )
        names = {
            "loss/total": "loss {:.2f}",
            "train/si_snri": "SI-SNRi {:.2f} dB",
            "validation/si_snri": "val {:.2f} dB",
        }
        state = "  ".join(
            text.format(shown[name]) for name, text in names.items() if shown.get(name) is not None
        )
        self.progress.update(self.task, completed=shown.get("step", 0), state=state)


def summarise(cfg: TrainConfig, console: Console) -> None:
    """Say what came out and what to do next."""
    committed = find_committed(storage.join(cfg.run_dir, "checkpoints"))
    state = json.loads(read_file(committed[-1], "state.json")) if committed else {}
    if reason := state.get("objective", {}).get("stop_reason"):
        console.print(
            f"ended at step {committed[-1].step}: {reason}", highlight=False, soft_wrap=True
        )
    best = best_of(committed)
    if best is not None:
        console.print(
            f"best validation score {best.score:.3g} at step {best.step}: {best.url}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"look at it: tensorboard --logdir {storage.join(cfg.run_dir, 'tensorboard')}",
        highlight=False,
        soft_wrap=True,
    )
