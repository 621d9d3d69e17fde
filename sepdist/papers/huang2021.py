"""Tables 1 to 3 and figure 2 of paper 1 (Huang et al. 2021) as pipelines.

    sepdist pipeline experiment=huang2021/table2_libri2mix data_root=data output=runs/table2

Each function listed in PIPELINES returns the stages and the table of one pipeline. `mini` is the
scale of two CPU cores, where one small corpus stands for both Libri2Mix and WSJ0-2mix. The paper's
numbers and settings are in huang2021.yaml.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from sepdist.papers.schema import PipelineConfig, RowConfig, StageConfig, TableConfig

Stages = dict[str, StageConfig]

COLUMNS = ["SI-SNRi", "SDRi", "steps", "minutes", "label switches in %"]
PAPER = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
REINIT = " init.reinit=[mask_conv]"  # the only layer that fine-tuning starts afresh


def table1(mini: bool) -> PipelineConfig:
    """What to pre-train with: Conv-TasNet on WSJ0-2mix from scratch and from SE, MAMA and CC."""
    tasks = ("se", "mama", "cc")
    stages = {task: pretrain(task, mini) for task in tasks}
    stages["wsj0_scratch"] = train("wsj0_scratch", title="from scratch")
    for task in tasks:
        settings = REINIT + " init.submodule=separator" * (task == "cc")
        stages[f"wsj0_{task}"] = train("wsj0_scratch", settings, [task], task.upper())
    stages |= tests(PAPER["table1"])
    stages["figure"] = StageConfig("figure", list(PAPER["table1"]), title="Pre-training tasks")
    rows = [row(stages[run].title, run, scores) for run, scores in PAPER["table1"].items()]
    return pipeline("table1", "Table 1, pre-training tasks, WSJ0-2mix", "wsj0", stages, rows, mini)


def table2_libri2mix(mini: bool) -> PipelineConfig:
    """Table 2, Libri2Mix, and figure 2 (a), (c): from scratch, PT-FT (SE), multi-task (SE)."""
    return table2("libri2mix", "Libri2Mix", mini)


def table2_wsj0(mini: bool) -> PipelineConfig:
    """Table 2, WSJ0-2mix, and figure 2 (b), (d)."""
    return table2("wsj0", "WSJ0-2mix", mini)


def table2(corpus: str, title: str, mini: bool) -> PipelineConfig:
    """One half of table 2: a training, a test and the label switches of each row; a figure."""
    multitask = PAPER["multitask"]["mini" if mini else corpus]
    runs = {
        f"{corpus}_scratch": train(f"{corpus}_scratch"),
        f"{corpus}_ptft": train(f"{corpus}_scratch", REINIT, ["se"]),
        f"{corpus}_multitask": train("libri2mix_multitask", multitask),
    }
    for run, stage in runs.items():
        stage.title = PAPER["table2"][run]["title"]
    stages = {"se": pretrain("se", mini)} | runs | tests(runs)
    stages[f"{corpus}_figure"] = StageConfig("figure", list(runs), title=title)
    stages |= {f"{run}_labels": StageConfig("labels", [run]) for run in runs}
    rows = [row(stage.title, run, PAPER["table2"][run]["paper"]) for run, stage in runs.items()]
    return pipeline(f"table2-{corpus}", f"Table 2, {title}", corpus, stages, rows, mini)


def figure2(mini: bool) -> PipelineConfig:
    """Figure 2, and with it the whole of table 2; at scale mini one half, of one corpus."""
    cfg, wsj0 = table2_libri2mix(mini), table2_wsj0(mini)
    cfg.name = "figure2-mini" if mini else "figure2"
    if mini:
        return cfg
    for name, stage in wsj0.stages.items():
        if stage.kind == "evaluate":
            wsj0.stages[name].overrides = [f"data={wsj0.test_data}"]
    for half, corpus in ((cfg, "Libri2Mix"), (wsj0, "WSJ0-2mix")):
        for one in half.tables[0].rows:
            one.title = f"{corpus}, {one.title}"
    cfg.title, cfg.stages = "Table 2", cfg.stages | wsj0.stages
    cfg.tables[0].rows += wsj0.tables[0].rows
    return cfg


def table3(mini: bool) -> PipelineConfig:
    """Separation models on WSJ0-2mix; (a), (d), (g) and (l) as in the models' own papers."""
    own = PAPER["settings"]
    stages = {
        "se": pretrain("se", mini),
        "se_dprnn": pretrain("se", mini, "data.crop_seconds=2.0", "dprnn"),
        "se_dptnet": pretrain("se", mini, "data.crop_seconds=4.0 " + own["dptnet"], "dptnet"),
    }
    for letter, (_, model, names, start, _) in PAPER["table3"].items():
        chosen = " ".join(own[name] for name in names)
        settings = f"model={model} " + ("data.micro_batch=1" * (letter in "jk") if mini else chosen)
        settings += REINIT if start else ""
        stages[letter] = train("wsj0_scratch", settings, [start] if start else [])
    stages |= tests(PAPER["table3"])
    rows = [row(f"({letter}) {one[0]}", letter, one[-1]) for letter, one in PAPER["table3"].items()]
    return pipeline("table3", "Table 3, separation models, WSJ0-2mix", "wsj0", stages, rows, mini)


def pretrain(task: str, mini: bool, settings: str = "", model: str = "") -> StageConfig:
    """Pre-train on Libri1Mix; `settings` are those of the paper's scale."""
    if mini:  # 500 steps, on other speakers than those of sep-train
        settings = "data.train=${data_root}/se-train training.max_steps=500 training.keep_every=0"
        settings += " objective.epoch_samples=2000" * (task == "cc")
    return train(task, (f"model={model} " if model else "") + settings)


def train(
    experiment: str, settings: str = "", uses: Sequence[str] = (), title: str = ""
) -> StageConfig:
    """Train an experiment of configs/experiment/huang2021."""
    return StageConfig("train", list(uses), [], title, f"huang2021/{experiment}", settings.split())


def tests(runs: Iterable[str]) -> Stages:
    """Evaluate each run."""
    return {f"{run}_test": StageConfig("evaluate", [run]) for run in runs}


def row(title: str, run: str, paper: Sequence[float]) -> RowConfig:
    """A row of `COLUMNS`: test scores of a run beside the paper's, and the cost of its training."""
    scores = [f"{run}_test:metrics_db.{metric}.mean" for metric in ("si_snri", "sdri")]
    costs = [f"{run}:{name}" for name in ("steps", "minutes", "switch_percent")]
    return RowConfig(title, [*scores, *costs], [*paper, None, None, None])


def pipeline(
    name: str, title: str, corpus: str, stages: Stages, rows: list[RowConfig], mini: bool
) -> PipelineConfig:
    """The pipeline of one table."""
    workers = ["num_workers=2"] if mini else ["num_workers=8", "use_gpu=true"]
    labels = [*workers, "num_mixtures=200"] if mini else workers
    return PipelineConfig(
        name=f"{name}-mini" if mini else name,
        title=title,
        test_data="${data_root}/test" if mini else PAPER["test_data"][corpus],
        stages=stages,
        overrides={"evaluate": workers, "labels": labels},
        tables=[TableConfig("", COLUMNS, rows)],
    )


PIPELINES = (table1, table2_libri2mix, table2_wsj0, figure2, table3)
