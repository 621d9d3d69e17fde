"""Commands and folders as users type them: odd names, wrong folders, full disks, docs."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from torch import nn

from sepdist import composing, config, papers
from sepdist.cli import compose
from sepdist.config import ConfigError, TrainConfig
from sepdist.papers import figures, pipeline
from sepdist.papers.schema import PipelineConfig, Stage
from sepdist.training import run
from sepdist.training.handoff import CheckpointError, check_weights
from tests.support.runs import ROOT


def test_cfg_job_trains_no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["-m", "experiment=demo/finetune", "optim.lr=1e-3,1e-4", "--cfg", "job"]
    monkeypatch.setattr(sys, "argv", ["sepdist train", *words])
    with pytest.raises(ConfigError, match="--cfg shows one run: leave out -m"):
        compose.read_config("train", TrainConfig, "", lambda words: pytest.fail("it trains"))


def test_a_full_disk_behind_the_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sepdist", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "No space left on device" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_closed_output_is_no_traceback() -> None:
    command = f"exec {sys.executable} -m sepdist --help >&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_shapes_of_the_learning_rate_are_told_at_their_key() -> None:
    told = {key: text for key, _, text in composing.keys("train", TrainConfig)}
    assert "cosine" in told["schedule.shape"] and "cosine" not in told["schedule.hold_steps"]


def test_ray_up_takes_all_configs_along() -> None:
    excluded = yaml.safe_load((ROOT / "cluster/local.yaml").read_text())["rsync_exclude"]
    folders = [ROOT / "sepdist", ROOT / "configs", ROOT / "cluster"]
    needed = [path.relative_to(ROOT).parts for folder in folders for path in folder.rglob("*")]
    # rsync compares a pattern without a slash with every name on the way.
    left = [path for path in needed for one in excluded if one in path or f"/{path[0]}" == one]
    assert left == []


def test_commands_on_the_demo_s_weights_keep_its_model() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for command in re.findall(r"^sepdist train (?:.*\\\n)*.*", page.read_text(), re.M):
            if "experiment=demo/finetune" in command and "init.weights" not in command:
                assert not re.search(r"\bmodel[.=]", command), f"{page.name}: {command}"


def test_an_output_without_predictions_has_no_scatter(tmp_path: Path) -> None:
    for text in ("id,si_snr,reason\na,1,\n", "id,true_1,predicted_1,reason\na,,,silent\n"):
        (tmp_path / "utterances.csv").write_text(text)
        with pytest.raises(ConfigError, match="give an output of `sepdist estimate`"):
            figures.read_predictions(str(tmp_path))


def test_the_command_of_a_run_is_the_one_that_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["sepdist train", "name=a", "run_dir=my runs/a"])
    run._write(TrainConfig("a", str(tmp_path)), {})
    known = json.loads((tmp_path / "environment.json").read_text())
    assert known["command"] == "sepdist train name=a 'run_dir=my runs/a'"


@pytest.mark.parametrize("name", ["huang2021/table2_libri2mix", "dang2023/table3"])
def test_a_pipeline_takes_folders_of_any_name(name: str) -> None:
    root, output = "/@home/jürgen (a)=b, c", "/läufe/@x=1"
    cfg = papers.PIPELINES[name](True)
    cfg = dataclasses.replace(cfg, scale="mini", data_root=root, output=output)
    stages = pipeline.plan(config.typed(OmegaConf.structured(cfg), PipelineConfig))
    found = [extra.url for one in stages if one.kind == "train" for extra in one.config.data.extra]
    assert found and all(url.startswith((f"{root}/", f"{output}/seed-0/")) for url in found)


def test_a_stage_in_a_folder_of_any_name_is_not_run_again(tmp_path: Path) -> None:
    folder = str(tmp_path / "\N{GRINNING FACE}")
    stage = Stage(0, "test", "evaluate", folder, config.EvaluateConfig("m", "d", folder))
    pipeline.mark_done(stage, 1.0)
    assert pipeline.is_done(stage)


def test_no_hint_at_what_is_set_already() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.output_parameters = ("1",)
    for reinit, hinted in ((["1"], False), ([], True)):
        with pytest.raises(CheckpointError, match="do not fit") as error:
            check_weights(model, {"1.bias": model[1].bias, "1.weight": model[1].weight}, reinit)
        assert ("init.reinit=['1']" in str(error.value)) == hinted
