"""Runs on several data sets and on new mixtures: the same bits at any world size, and usable."""

import io
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from rich.console import Console

from sepdist import config, slots
from sepdist.config import ConfigError, DataConfig, EvaluateConfig, ExtraConfig, TrainConfig
from sepdist.data.crops import Crops
from sepdist.inference.evaluation import evaluate
from sepdist.inference.export import load_export
from sepdist.reporting import read_metrics
from sepdist.training.audit import audit
from sepdist.training.checkpoint import find_committed, load_snapshot
from sepdist.training.datasets import open_datasets
from sepdist.training.run import freeze
from tests.support.loops import run
from tests.support.runs import final_hash, frozen

MULTITASK = ["objective=multitask", "model.num_speakers=3", "data.num_virtual_shards=4"]


def extra(data: dict[str, str], weight: float) -> str:
    return f"data.extra=[{{name: enhancement, url: {data['train']}, weight: {weight}}}]"


@pytest.fixture(scope="module")
def multitask(tiny_data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 steps of 4 at world size 1: 15 samples an epoch, 10 of separation and 5 of enhancement."""
    folder = tmp_path_factory.mktemp("multitask") / "one"
    run(tiny_data, folder, 1, 0, 0, 1.0, *MULTITASK, extra(tiny_data, 0.5))
    return folder


def test_a_run_on_two_data_sets_measures_each_task_and_validates_separation(
    multitask: Path,
) -> None:
    rows = read_metrics(str(multitask))
    logged = [row for row in rows if "loss/total" in row]
    tasks = [
        {name for name in ("si_snr", "enhancement_si_snr") if f"train/{name}" in row}
        for row in logged
    ]
    assert len(logged) == 8 and set.union(*tasks) == {"si_snr", "enhancement_si_snr"} and all(tasks)
    for row in logged:  # the loss is the mean over the batches of both tasks
        values = [
            row[f"train/{name}"]
            for name in ("si_snr", "enhancement_si_snr")
            if f"train/{name}" in row
        ]
        assert min(values) - 1e-6 <= -row["loss/total"] <= max(values) + 1e-6
    validation = next(row for row in rows if "validation/si_snri" in row)
    assert {name for name in validation if name.startswith("validation/")} == {
        "validation/loss",
        "validation/si_snr",
        "validation/si_snri",
    }
    assert [row["switching/epoch"] for row in rows if "switching/rate" in row] == [1.0]
    assert audit(str(multitask)).sound


def test_ranks_with_batches_of_different_tasks_and_a_restart_come_to_the_same_weights(
    multitask: Path, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = [*MULTITASK, extra(tiny_data, 0.5)]
    run(
        tiny_data,
        tmp_path,
        1,
        0,
        0,
        1.0,
        *options,
        "training.max_steps=2",
        "validation.num_mixtures=1",
    )
    (tmp_path / "store").unlink()
    rows = run(
        tiny_data, tmp_path, 2, 0, 0, 1.0, *options, "engine.zero_stage=1"
    )  # an epoch ends in steps 4 and 8
    assert final_hash(tmp_path) == final_hash(multitask)

    def measured(rows: list[dict]) -> list[dict]:
        names = ("step", "loss/total", "optim/grad_norm", "switching/rate")
        kept = [
            {k: v for k, v in row.items() if k in names or k.startswith("train/")} for row in rows
        ]
        return [row for row in kept if len(row) > 1]

    assert measured(rows) == measured(read_metrics(str(multitask)))


def test_a_multitask_checkpoint_gives_the_speakers_alone(
    multitask: Path, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    model = load_export(str(multitask)).model
    assert model(torch.randn(1, 4000)).shape == (1, 2, 4000)
    cfg = EvaluateConfig(
        model=str(multitask),
        data=tiny_data["dev"],
        output=str(tmp_path),
        num_mixtures=1,
        num_workers=0,
    )
    results = evaluate(cfg, Console(file=io.StringIO()))
    assert results["num_utterances"] == 1
    snapshot = load_snapshot(find_committed(f"{multitask}/checkpoints")[-1].url)
    assert snapshot.weights["mask_conv.weight"].shape[0] == 3 * 16, "the hand-off keeps all outputs"
    assert (
        snapshot.state["manifest"].startswith("11 main ")  # 16 units: four steps
        and " + 5 enhancement " in snapshot.state["manifest"]
    )


def config_of(data: dict[str, str], folder: Path, *more: str) -> TrainConfig:
    return config.load_frozen(frozen(data, folder, "training.max_steps=1", *more))


def test_new_mixtures_train_and_have_no_switch_rate(
    tiny_data: dict[str, str], tmp_path: Path
) -> None:
    mixing = ["mixing=dynamic", "data.num_virtual_shards=4"]
    run(tiny_data, tmp_path, 1, 0, 0, 1.0, *mixing)
    cfg = config_of(tiny_data, tmp_path / "again", *mixing)
    feeds, validation = open_datasets(cfg)
    item = feeds["main"].item(0, [])
    assert list(item.members) == ["s1", "s2"] and len(set(item.speakers)) == 2
    assert validation.members == ("s1", "s2")
    assert audit(str(tmp_path)).sound
    assert not any("switching/rate" in row for row in read_metrics(str(tmp_path))), (
        "no mixture comes twice"
    )


def test_each_data_set_has_an_order_and_crops_of_its_own(
    tiny_data: dict[str, str], tmp_path: Path
) -> None:
    feeds, _ = open_datasets(config_of(tiny_data, tmp_path, extra(tiny_data, 1.0)))
    main, other = feeds["main"], feeds["enhancement"]
    assert isinstance(main, Crops) and isinstance(other, Crops)
    assert main.seed == 0 != other.seed, (
        "what a run trains on does not change when a data set is added"
    )
    assert [main.order.locate(p) for p in range(10)] != [other.order.locate(p) for p in range(10)]
    assert list(main.item(0, []).members) == ["s1", "s2"] and list(other.item(0, []).members) == [
        "s1",
        "noise",
    ]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data.extra=[{name: main, url: x}]"], r"two data sets are named 'main'"),
        (["mixing=dynamic", "data.noise=true"], r"data\.noise=True with data\.mixing\.noise=None"),
        (
            ["mixing=dynamic", "data.mixing.noise=x"],
            r"data\.noise=False with data\.mixing\.noise=.*x",
        ),
        (["data.interleave=odd"], r"data\.interleave=.odd.: it is one of drawn, even"),
        (
            ["objective=mixit", "model.num_speakers=3"],
            r"more than 3 outputs: set model\.num_speakers=4",
        ),
        (["objective=multitask"], r"MultiTask needs data\.extra with the name enhancement"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_worker_starts(
    more: list[str], message: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    cfg = config_of(tiny_data, tmp_path, *more)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ValueError, match=message):
        freeze(cfg, Console(file=io.StringIO()))


def test_the_config_of_a_run_of_another_version_is_refused_with_what_to_do(
    tiny_data: dict[str, str], tmp_path: Path
) -> None:
    path = Path(frozen(tiny_data, tmp_path, "training.max_steps=1"))
    path.write_text(path.read_text().replace("max_skipped:", "max_rollbacks: 3\n  max_skipped:"))
    with pytest.raises(ConfigError, match=r"another version .*max_rollbacks.*init\.weights"):
        config.load_frozen(str(path))


class Tables:
    """Takes a path, and an objective that takes one too."""

    path_arguments = ("table",)
    parts: ClassVar = {"inner": "objective"}

    def __call__(self) -> None: ...


def test_every_path_of_a_config_is_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SEPDIST_PLUGINS", "tests")
    tables = {"_target_": "tests.training.test_datasets.Tables", "table": "a.csv", "other": "b"}
    cfg = TrainConfig(
        run_dir="runs/a",
        model={"_target_": "sepdist.models.conv_tasnet.ConvTasNet", "name": "c"},
        objective=tables | {"inner": tables | {"table": "~/b.csv"}, "tables": [{"table": "c"}]},
    )
    cfg.data = DataConfig(train="../train", validation="/dev", extra=[ExtraConfig("x", "y")])
    cfg.init.weights = "~/weights"
    slots.make_paths_absolute(cfg)
    here = str(tmp_path)
    assert cfg.run_dir == f"{here}/runs/a" and cfg.init.weights == "/home/me/weights"
    assert cfg.data.train == f"{tmp_path.parent}/train" and cfg.data.validation == "/dev"
    assert cfg.data.extra[0].url == f"{here}/y" and cfg.data.cache_dir == "/home/me/.cache/sepdist"
    objective = cfg.objective
    assert objective["table"] == f"{here}/a.csv" and objective["other"] == "b"
    assert objective["inner"]["table"] == "/home/me/b.csv"
    assert objective["tables"] == [{"table": "c"}], "values that are no part stay as they are"
    assert cfg.model["name"] == "c" and cfg.data_root == "data"


def test_paths_of_all_data_sets_are_made_absolute(
    tiny_data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Path(tiny_data["train"])
    monkeypatch.chdir(place.parent)
    cfg = config_of(tiny_data, tmp_path, extra({"train": place.name}, 1.0), "mixing=dynamic")
    (tmp_path / "config.yaml").unlink()
    made = freeze(cfg, Console(file=io.StringIO()))
    assert made.data.extra[0].url == str(place)
    assert config.load_frozen(str(tmp_path / "config.yaml")) == made


def test_a_mixit_run_on_labelled_and_unlabelled_mixtures_gives_the_loudest_outputs(
    tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = [
        "objective=mixit",
        "model.num_speakers=4",
        "objective.data_set=unlabelled",
        "data.micro_batch=2",
    ]
    options += ["data.num_virtual_shards=2", "data.interleave=even", "training.max_steps=3"]
    rows = run(
        tiny_data,
        tmp_path,
        1,
        0,
        0,
        1.0,
        *options,
        extra(tiny_data, 1.0).replace("enhancement", "unlabelled"),
    )
    logged = [row for row in rows if "loss/total" in row]
    assert all(
        {"train/mixture_snr", "train/si_snr", "train/oracle_si_snr"} <= row.keys() for row in logged
    )
    validation = next(row for row in rows if "validation/si_snri" in row)
    assert "validation/mixture_snr" not in validation
    assert validation["validation/si_snr"] <= validation["validation/oracle_si_snr"]
    assert not any("switching/rate" in row for row in rows)
    assert load_export(str(tmp_path)).model(torch.randn(1, 4000)).shape == (1, 2, 4000)
    cfg = EvaluateConfig(
        model=str(tmp_path),
        data=tiny_data["dev"],
        output=str(tmp_path / "scores"),
        num_mixtures=1,
        num_workers=0,
    )
    assert evaluate(cfg, Console(file=io.StringIO()))["num_utterances"] == 1
    assert (
        load_snapshot(find_committed(f"{tmp_path}/checkpoints")[-1].url)
        .state["manifest"]
        .endswith(", even")
    )
