"""A pipeline of tiny stages: order, hand-off, restarts, refusals and the table."""

import contextlib
import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.multiprocessing as mp
from rich.console import Console

from sepdist import config, storage
from sepdist.config import ConfigError
from sepdist.data.members import DataError
from sepdist.papers import pipeline, tables
from sepdist.papers.schema import PipelineConfig, RowConfig, Stage, StageConfig, TableConfig
from sepdist.papers.tables import number_of
from sepdist.reporting import read_metrics
from sepdist.training import launch
from sepdist.training.handoff import read_export
from tests.support.runs import TINY, program


def run_loop(rank: int, config_file: str) -> None:
    from sepdist.training import loop
    from sepdist.training.world import join_world

    os.environ["DS_ACCELERATOR"] = "cpu"
    loop.train(config.load_frozen(config_file), join_world())


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """Names of the stages that were trained, here in a process of their own without Ray."""
    names: list[str] = []

    def train_here(cfg: config.TrainConfig, *_: object) -> None:
        names.append(Path(cfg.run_dir).name)
        mp.start_processes(
            run_loop, (storage.join(cfg.run_dir, "config.yaml"),), start_method="forkserver"
        )

    @contextlib.contextmanager
    def no_ray(num_cpus: int, **options: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(launch, "launch", train_here)
    monkeypatch.setattr(pipeline, "connected", no_ray)
    return names


def tiny(data: dict[str, str], output: Path, **changes: Any) -> PipelineConfig:
    """SE, PIT from it for two epochs, a test of both, a figure and labels."""
    places = [f"data.train={data['train']}", f"data.validation={data['dev']}"]
    steps = ["training.max_steps=6", "validation.every_steps=3", "training.keep_every=3"]
    stages = {
        "se": StageConfig(experiment="demo/pretrain", overrides=["training.max_steps=2"]),
        "ptft": StageConfig(experiment="demo/finetune", uses=["se"], title="PT-FT"),
        "se_test": StageConfig("evaluate", uses=["se"]),
        "ptft_test": StageConfig("evaluate", uses=["ptft"]),
        "figure": StageConfig("figure", uses=["se", "ptft"]),
        "labels": StageConfig("labels", uses=["ptft"]),
    }
    costs = [f"ptft:{name}" for name in ("steps", "minutes", "switch_percent")]
    rows = [
        RowConfig("other work", ["-"] * 4, [1.0, None, None, None]),
        RowConfig("PT-FT", ["ptft_test:metrics_db.si_snri.mean", *costs], [14.1, None, None, None]),
    ]
    values = {
        "name": "tiny",
        "output": str(output),
        "test_data": data["dev"],
        "stages": stages,
        "overrides": {
            "train": [*places, *TINY, *steps],
            "evaluate": ["num_workers=0", "num_listening=0"],
            "labels": ["num_workers=0"],
        },
        "tables": [TableConfig("", ["SI-SNRi", "steps", "minutes", "label switches in %"], rows)],
    }
    return PipelineConfig(**values | changes)


def test_stages_run_in_order_hand_on_their_weights_and_are_not_run_again(
    tiny_data, tmp_path: Path, trained, monkeypatch
) -> None:
    console = Console(quiet=True)
    monkeypatch.chdir(tmp_path.parent)
    output = Path(tmp_path.name)  # relative, as people write it
    cfg = tiny(tiny_data, output)
    pipeline.run(cfg, console)
    assert trained == ["se", "ptft"]
    seed = tmp_path / "seed-0"
    assert {p.name for p in seed.iterdir()} == set(cfg.stages) and all(
        (seed / s / "stage.json").exists() for s in cfg.stages
    )

    _, _, lineage, _ = read_export(str(seed / "ptft"))
    assert lineage["parent"]["run"] == "tiny-se-0" and lineage["parent"]["step"] == 2
    assert lineage["reinitialised"] == ["mask_conv.bias", "mask_conv.weight"]
    assert read_export(str(seed / "se"))[2]["parent"] is None
    assert (seed / "figure" / "figure.png").exists() and (
        seed / "labels" / "step-000000003.csv"
    ).exists()

    with open(seed / "ptft_test" / "utterances.csv", newline="") as file:
        scores = [float(row["si_snri"]) for row in csv.DictReader(file)]
    [table] = json.loads((tmp_path / "table.json").read_text())["tables"]
    other, ours = table["rows"]
    assert other["title"] == "other work"
    assert other["cells"] == [{"paper": paper, "seeds": {}} for paper in (1.0, None, None, None)]
    si_snri, steps, minutes, switches = (cell["seeds"]["0"] for cell in ours["cells"])
    assert si_snri == pytest.approx(np.mean(scores), abs=1e-4) and len(scores) == 4
    rates = [
        row["switching/rate"] for row in read_metrics(str(seed / "ptft")) if "switching/rate" in row
    ]
    assert steps == 6 and minutes > 0 and switches == pytest.approx(100 * np.mean(rates))

    trained.clear()
    before = {
        p: p.stat().st_mtime_ns for p in seed.rglob("*") if p.is_file() and "figure" not in str(p)
    }
    pipeline.run(tiny(tiny_data, output), console)
    assert trained == [] and before == {p: p.stat().st_mtime_ns for p in before}

    changed = tiny(tiny_data, output)
    changed.stages["ptft"].overrides.append("optim.lr=0.5")
    with pytest.raises(
        ConfigError,
        match=r"stage ptft .*optim\.lr was 0\.002, is 0\.5.*another output, or move .*ptft",
    ):
        pipeline.run(changed, console)
    changed.stages["ptft"].overrides[-1] = (
        "cluster.num_workers=1"  # another number of workers gives the same result
    )
    pipeline.run(changed, console)
    assert trained == []

    moved = Path(tmp_path.name + "-moved")
    tmp_path.rename(tmp_path.parent / moved)
    pipeline.run(tiny(tiny_data, moved), console)
    pipeline.run(tiny(tiny_data, moved.absolute()), console)
    assert trained == []  # ptft has the weights of se, which was moved along
    (tmp_path.parent / moved).rename(tmp_path)

    marker = json.loads((seed / "ptft" / "stage.json").read_text())
    for key in ("interleave", "order"):  # a stage from before there were these keys
        del marker["config"]["data"][key]
    del marker["config"]["model"]["causal"]  # nor this argument
    (seed / "ptft" / "stage.json").write_text(json.dumps(marker))
    pipeline.run(tiny(tiny_data, output), console)
    assert trained == []
    marker["config"]["nonsense"] = 1
    for text in (json.dumps(marker), json.dumps(marker)[:50], "[]"):
        (seed / "ptft" / "stage.json").write_text(text)
        with pytest.raises(ConfigError, match=r"ptft/stage\.json: is no marker of this version"):
            pipeline.run(tiny(tiny_data, output), console)


def test_a_cell_that_is_no_number_is_named(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"metrics_db": {"sdri": {"mean": 3.5}}, "none": null}')
    stage = Stage(0, "x_test", "evaluate", str(tmp_path), None)
    assert number_of(stage, "metrics_db.sdri.mean") == 3.5 and number_of(stage, "none") is None
    with pytest.raises(ConfigError, match=r"metrics_db\.sdri is no number: change x_test:metrics"):
        number_of(stage, "metrics_db.sdri")


def test_an_interrupted_pipeline_goes_on_at_its_stage(
    tiny_data, tmp_path: Path, monkeypatch
) -> None:
    calls: list[str] = []

    def run_stage(cfg: Any, console: Console) -> None:
        calls.append(Path(getattr(cfg, "run_dir", "") or cfg.output).name)
        if calls == ["se", "ptft"]:
            raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "RUNNERS", dict.fromkeys(pipeline.RUNNERS, run_stage))
    monkeypatch.setattr(pipeline, "connected", lambda *_, **__: contextlib.nullcontext())
    cfg = tiny(tiny_data, tmp_path, tables=[], seeds=[3, 4])
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(cfg, Console(quiet=True))
    pipeline.run(cfg, Console(quiet=True))
    names = ["figure.png" if name == "figure" else name for name in cfg.stages]
    assert calls == ["se", "ptft", *names[1:], *names]


def test_each_seed_trains_with_its_own(tiny_data, tmp_path: Path) -> None:
    stages = pipeline.plan(tiny(tiny_data, tmp_path, seeds=[3, 5]))
    trains = [stage for stage in stages if stage.kind == "train"]
    assert [stage.config.seed for stage in trains] == [3, 3, 5, 5]
    assert trains[3].config.init.weights == str(tmp_path / "seed-5" / "se") == trains[2].folder
    tests = [stage for stage in stages if stage.kind == "evaluate"]
    assert [stage.config.model for stage in tests] == [
        str(tmp_path / f"seed-{s}" / n) for s in (3, 5) for n in ("se", "ptft")
    ]


@pytest.mark.parametrize(
    ("name", "stage", "message"),
    [
        ("a", StageConfig("trane"), "stage a: kind='trane'.*train, shards, evaluate"),
        ("a", StageConfig("evaluate", uses=["later"]), r"stage a: uses=\['later'\]"),
        ("a", StageConfig("evaluate", uses=[["b"]]), r"stage a: uses=\[\['b'\]\]"),  # type: ignore[list-item]
        ("a", StageConfig("evaluate"), r"stage a: uses=\[\]"),
        ("a", StageConfig(experiment="demo/none"), "stage a: .*demo/none"),
        (
            "a",
            StageConfig(experiment="demo/pretrain", overrides=["optim.momentun=1"]),
            "stage a: .*momentun",
        ),
        ("a", StageConfig(overrides=[["a=1"]]), r"stage a: \['a=1'\]: give KEY=VALUE"),  # type: ignore[list-item]
        ("a", StageConfig(), "stage a: .*training.max_steps"),
    ],
)
def test_a_stage_that_does_not_compose_stops_the_pipeline_before_its_first(
    tmp_path: Path, trained, name: str, stage: StageConfig, message: str
) -> None:
    cfg = PipelineConfig("bad", output=str(tmp_path), stages={name: stage})
    with pytest.raises(ConfigError, match=message):
        pipeline.run(cfg, Console(quiet=True))
    assert trained == [] and not any(tmp_path.iterdir())


def test_a_test_set_that_is_missing_stops_the_pipeline_before_its_first(
    tiny_data, tmp_path: Path, trained
) -> None:
    cfg = tiny(tiny_data, tmp_path / "out", test_data=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"no manifest\.json in .*nowhere"):
        pipeline.run(cfg, Console(quiet=True))
    assert trained == [] and not any(tmp_path.iterdir())


def estimating(data: dict[str, str], output: Path, **changes: Any) -> PipelineConfig:
    """Separate a tenth of a data set, train an estimator on it and score the estimator."""
    separated = [
        "corpus=separated",
        "corpus.noise=false",
        "corpus.data=@tenth",
        "corpus.model=@separator",
    ]
    places = [f"data.validation={data['dev']}", *TINY, "training.max_steps=2"]
    stages = {
        "tenth": StageConfig(
            "shards",
            overrides=["corpus=stored", f"corpus.data={data['train']}", "subset=[0.0,0.1]"],
        ),
        "separator": StageConfig(
            experiment="demo/finetune", overrides=["data.train=@tenth", "init.weights=null"]
        ),
        "separated": StageConfig("shards", overrides=separated),
        "estimator": StageConfig(
            experiment="demo/finetune", overrides=["data.train=@separated", "init.weights=null"]
        ),
        "scored": StageConfig("estimate", uses=["estimator"], overrides=["data=@separated"]),
    }
    row = RowConfig("SSQP", ["scored:lcc", "-"], [0.9, None])
    values = {
        "tables": [TableConfig("Table 1, LCC", ["DR", "SF"], [row])],
        "overrides": {"train": places},
    }
    return PipelineConfig("estimating", output=str(output), stages=stages, **values | changes)


def test_at_a_stages_name_stands_its_folder(tiny_data, tmp_path: Path) -> None:
    stages = {
        stage.name: stage.config
        for stage in pipeline.plan(estimating(tiny_data, tmp_path, seeds=[4]))
    }
    folder = tmp_path / "seed-4"
    assert stages["separator"].data.train == str(folder / "tenth") == stages["tenth"].output
    assert (
        stages["separated"].corpus["data"] == str(folder / "tenth")
        and stages["tenth"].split == "tenth"
    )
    assert stages["separated"].corpus["model"] == str(folder / "separator") and stages[
        "tenth"
    ].subset == [0.0, 0.1]
    assert stages["scored"].data == str(folder / "separated") and stages["scored"].model == str(
        folder / "estimator"
    )
    later = estimating(tiny_data, tmp_path)
    later.stages["tenth"].overrides[1] = "corpus.data=@scored"
    with pytest.raises(
        ConfigError,
        match=r"stage tenth: corpus.data=@scored: @scored is none of the earlier stages",
    ):
        pipeline.plan(later)


def test_a_stage_scores_several_data_sets_of_other_stages_and_of_elsewhere(
    tiny_data, tmp_path: Path, trained
) -> None:
    cfg = estimating(tiny_data, tmp_path)
    both = StageConfig("evaluate", ["separator"], overrides=[f"data=[@tenth,{tiny_data['dev']}]"])
    cfg.stages["both"] = both
    *_, stage = pipeline.plan(cfg)
    assert pipeline.data_sets(stage) == [str(tmp_path / "seed-0/tenth"), tiny_data["dev"]]
    found = {"seed-0-tenth": {"metrics_db": {"si_snri": {"mean": 2.5}}}}
    Path(stage.folder).mkdir(parents=True)
    (Path(stage.folder) / "results.json").write_text(json.dumps({"data_sets": found}))
    assert number_of(stage, "data_sets.seed-0-tenth.metrics_db.si_snri.mean") == 2.5
    both.overrides[0] = f"data=[@tenth,{tmp_path}/nowhere]"
    with pytest.raises(DataError, match=r"no manifest\.json in .*nowhere"):
        pipeline.run(cfg, Console(quiet=True))
    assert trained == []


def test_a_table_shows_what_its_cells_name_beside_the_paper(
    tiny_data, tmp_path: Path, monkeypatch
) -> None:
    lcc = {3: 0.8, 4: 0.9}

    def run_stage(cfg: Any, console: Console) -> None:
        if isinstance(cfg, config.EvaluateConfig):
            seed = int(Path(cfg.output).parent.name.split("-")[1])
            storage.put_bytes(
                storage.join(cfg.output, "results.json"), json.dumps({"lcc": lcc[seed]}).encode()
            )

    monkeypatch.setattr(pipeline, "RUNNERS", dict.fromkeys(pipeline.RUNNERS, run_stage))
    monkeypatch.setattr(pipeline, "connected", lambda *_, **__: contextlib.nullcontext())
    cfg = estimating(tiny_data, tmp_path, seeds=[3, 4])
    pipeline.run(
        cfg, Console(quiet=True)
    )  # the data sets that its own stages make are not missed beforehand
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[2:] == [
        "## Table 1, LCC",
        "",
        "| | DR | SF |",
        "|---|---|---|",
        "| SSQP | 0.85 (0.80, 0.90) (paper 0.9) |  |",
    ]
    cell = json.loads((tmp_path / "table.json").read_text())["tables"][0]["rows"][0]["cells"][0]
    assert cell == {"paper": 0.9, "seeds": {"3": 0.8, "4": 0.9}}
    cfg.tables[0].rows[0].cells[0] = "scored:mae"
    with pytest.raises(ConfigError, match=r"results have no mae: change the cell scored:mae"):
        pipeline.run(cfg, Console(quiet=True))
    cfg.tables[0].rows[0].cells[0] = "scord:mae"
    with pytest.raises(ConfigError, match=r"'scord:mae' is not STAGE:NUMBER of a stage"):
        pipeline.run(cfg, Console(quiet=True))


def test_the_table_has_means_over_seeds_and_each_seed() -> None:
    def cells(*each: tuple[float | None, list[float | None]]) -> list[dict[str, Any]]:
        return [
            {"paper": paper, "seeds": {str(i): one for i, one in enumerate(seeds)}}
            for paper, seeds in each
        ]

    rows = [
        {"title": "scratch", "cells": cells((13.2, [2.0, 3.0]), (None, [10, 10]))},
        {"title": "quoted", "cells": cells((15.3, []), (None, []))},
        {"title": "one seed", "cells": cells((None, [-1.25]), (None, [None]))},
    ]
    table = {"title": "", "columns": ["SI-SNRi", "steps"], "digits": 2, "rows": rows}
    results = {"name": "n", "title": "Table 9", "tables": [table, table | {"title": "b"}]}
    lines = tables.to_markdown(results).splitlines()
    assert lines[:7] == [
        "# Table 9",
        "",
        "| | SI-SNRi | steps |",
        "|---|---|---|",
        "| scratch | 2.50 (2.00, 3.00) (paper 13.2) | 10 (10, 10) |",
        "| quoted | (paper 15.3) |  |",
        "| one seed | -1.25 |  |",
    ]
    assert lines[7:] == ["", "## b", *lines[1:7]]


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_the_program_runs_a_paper_table_on_ray(tiny_data, tmp_path: Path) -> None:
    for name in ("sep-train", "se-train", "dev", "test"):
        (tmp_path / name).symlink_to(tiny_data["train" if "train" in name else "dev"])
    every = [
        f"{key}=3"
        for key in ("validation.every_steps", "training.checkpoint_every", "training.keep_every")
    ]
    train = [*TINY, "training.max_steps=6", *every]
    arguments = [
        *(
            "-m",
            "sepdist",
            "pipeline",
            "experiment=huang2021/table2_libri2mix",
            "scale=mini",
            f"output={tmp_path / 'out'}",
        ),
        f"data_root={tmp_path}",
        f"overrides.train=[{','.join(repr(one) for one in train)}]",
    ]
    assert "stage 1 of " in program(*arguments, timeout=1800)
    assert "has finished before" in program(*arguments)
    assert (tmp_path / "out" / "table.md").read_text().count("\n") > 5


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_the_program_runs_the_whole_chain_of_paper_2_on_ray(tiny_data, tmp_path: Path) -> None:
    def given(*changes: str) -> str:
        return f"[{','.join(repr(one) for one in changes)}]"

    steps = ["training.max_steps=2", "training.checkpoint_every=1", "validation.every_steps=1"]
    small = [
        "validation.num_mixtures=2",
        "validation.max_seconds=1.0",
        "validation.num_listening=1",
    ]
    crops = ["data.crop_seconds=0.5", "data.micro_batch=1", f"data.validation={tiny_data['dev']}"]
    (tmp_path / "data").mkdir()  # which the separators' experiments name
    (tmp_path / "data" / "sep-train").symlink_to(tiny_data["train"])
    arguments = [
        *("-m", "sepdist", "pipeline", "experiment=dang2023/chain", "scale=mini"),
        *(f"output={tmp_path}", f"data_root={tmp_path / 'data'}"),
        *(f"vars.{name}={tiny_data['train']}" for name in ("estimator_data", "mixtures")),
        *(f"vars.{name}={tiny_data['dev']}" for name in ("dev", "test")),
        *(f"test_data={tiny_data['dev']}", "vars.estimator_subset=[0.0,1.0]"),
        f"overrides.train={given(*steps, *small, *crops)}",
        f"overrides.shards={given('num_workers=2', 'samples_per_shard=3')}",
    ]
    output = program(*arguments)
    assert "SSLM-SS" in output and "LCC" in output
    folder = tmp_path / "seed-0"
    _, _, lineage, _ = read_export(str(folder / "sslm_10"))
    assert lineage["step"] == 2 and lineage["estimator"]["run"] == "dang2023-mini-ssqp_dr-0"
    assert (folder / "gap_10" / "figure.png").exists()
    assert (tmp_path / "chain.md").read_text().count("(paper ") == 4
    assert "has finished before" in program(*arguments)
