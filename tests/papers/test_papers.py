"""The papers' pipelines have the stages and tables of the YAML files that they replaced."""

import copy
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from sepdist import composing, config, papers
from sepdist.cli import pipeline as cli_pipeline
from sepdist.papers import pipeline
from sepdist.papers.schema import PipelineConfig, Stage

# What the YAML files gave, written down before they went: for each pipeline its stages with their
# kinds, the stages that they use, and a hash of their configs; a hash of its tables. `keys` are all
# keys that entered a hash: not the engine's, not compile, and not names and folders of stages.
WAS = json.loads(Path(__file__).with_name("pipelines.json").read_text())
# New names -> those of the YAML files.
OLD_KEYS = {
    "objective.estimator": "objective.judge",
    "init.submodule": "init.part",
    "subset": "part",
    "runs.CNN [11] (SF)": "runs.baseline",
}
OLD_VALUES = {
    "estimate": "judge",
    "sepdist.inference.export.load_estimator": "sepdist.inference.export.load_model",
    "Predicted and true SI-SNR": "What the judge says",
    "Figure 3, SI-SNR of the separators' estimates": "Figure 3, SI-SNR of what the separators make",
    "SSQP-Net on DR's estimates of the test set": "SSQP-Net on what DR makes of the test set",
    "CNN [11], SF": "baseline, SF, CNN",
}
SCALES = [(name, scale) for name in papers.PIPELINES for scale in ("", "mini")]


def planned(name: str, scale: str) -> tuple[PipelineConfig, list[Stage]]:
    """The pipeline as `sepdist pipeline` would have it, and its plan."""
    cfg = dataclasses.replace(
        papers.PIPELINES[name](scale == "mini"), scale=scale, data_root="/data", output="/out"
    )
    cfg = config.typed(OmegaConf.structured(cfg), PipelineConfig)
    return cfg, pipeline.plan(cfg)


@pytest.fixture(scope="module", autouse=True)
def _compose_each_stage_once() -> Any:
    """Pipelines have most stages in common, and composing takes its time."""
    compose, made = composing.compose, {}

    def composed(name: str, words: Any, schema: Any) -> Any:
        key = (name, *words)
        if key not in made:
            made[key] = compose(name, words, schema)
        return copy.deepcopy(made[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composing, "compose", composed)
        yield


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries by their dotted, old names."""
    if isinstance(value, dict) and value:
        inner = [leaves(one, f"{name}.{key}".lstrip(".")) for key, one in value.items()]
        return {key: one for each in inner for key, one in each.items()}
    for new, old in OLD_KEYS.items():
        if name == new or name.startswith(f"{new}."):
            name = old + name.removeprefix(new)
    return {name: OLD_VALUES.get(value, value) if isinstance(value, str) else value}


def digest(values: Any) -> str:
    """A short hash of what JSON holds."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def own_leaves(stage: Stage) -> dict[str, Any]:
    """The leaves of a stage's config in which it differs from the schema, of keys known then."""
    default = {} if stage.kind == "figure" else leaves(dataclasses.asdict(type(stage.config)()))
    own = dataclasses.asdict(stage.config)
    for one in own["data"]["extra"] if stage.kind == "train" else ():
        assert one.pop("speeds") == []  # a key that is younger
    return {
        key: value
        for key, value in leaves(own).items()
        if key in WAS["keys"] and (key not in default or default[key] != value)
    }


@pytest.mark.parametrize(("name", "scale"), SCALES)
def test_the_stages_of_a_pipeline_are_those_of_its_yaml_file(name: str, scale: str) -> None:
    cfg, stages = planned(name, scale)
    was = WAS["pipelines"][f"{name}_{scale}".rstrip("_")]
    assert {key: getattr(cfg, key) for key in ("name", "results", "test_data")} == was["config"]
    assert [stage.name for stage in stages] == list(was["stages"])
    for stage in stages:
        kind, uses, expected = was["stages"][stage.name]
        assert (stage.kind, list(cfg.stages[stage.name].uses)) == (
            kind.replace("judge", "estimate"),
            uses,
        )
        own = own_leaves(stage)
        assert digest(own) == expected, f"{stage.name} has changed, it is now {own}"


@pytest.mark.parametrize(("name", "scale"), SCALES)
def test_the_tables_of_a_pipeline_are_those_of_its_yaml_file(name: str, scale: str) -> None:
    cfg = papers.PIPELINES[name](scale == "mini")
    tables: list[Any] = [OLD_VALUES.get(cfg.title, cfg.title)]
    for table in cfg.tables:
        # Tables of paper 1 had SI-SNRi and SDRi by stage, the cost of training was added.
        width = len(table.columns) if table.title else 2
        title = OLD_VALUES.get(table.title, table.title)
        tables.append([title, table.columns[:width]])
        for row in table.rows:
            tables.append([OLD_VALUES.get(row.title, row.title), row.cells[:width]])
            tables[-1].append(list(row.paper[:width]))
    expected = WAS["pipelines"][f"{name}_{scale}".rstrip("_")]["tables"]
    assert digest(tables) == expected, f"the tables have changed, they are now {tables}"


def test_scale_mini_of_an_experiment_is_what_a_pipeline_trains_unless_a_paper_sets_more() -> None:
    """For example the twin libri2mix_scratch_mini was exactly this."""
    _, stages = planned("huang2021/table2_libri2mix", "mini")
    [stage] = [one for one in stages if one.name == "libri2mix_scratch"]
    chosen = ["experiment=huang2021/libri2mix_scratch", "scale=mini"]
    fixed = {"data_root": "/data", "run_dir": stage.config.run_dir, "name": stage.config.name}
    assert pipeline.composed("train", chosen, fixed, config.TrainConfig) == stage.config


def test_the_command_line_chooses_a_pipeline_its_scale_and_its_values(monkeypatch) -> None:
    given: list[PipelineConfig] = []
    monkeypatch.setattr(pipeline, "run", lambda cfg, console: given.append(cfg))
    chosen = ["vars.ssqp=ssqp_whisper", "vars.pretrained=/whisper", "seeds=[3,4]"]
    chosen += ["stages.sf.overrides=['optim.lr=0.5']", "overrides.train=['optim.lr=0.1']"]
    command = ["sepdist pipeline", "experiment=dang2023/figure4", "output=/out", "scale=mini"]
    monkeypatch.setattr(sys, "argv", [*command, *chosen])
    cli_pipeline.main()
    [cfg] = given
    assert (cfg.name, cfg.scale, cfg.output, cfg.seeds) == ("dang2023-mini", "mini", "/out", [3, 4])
    stages = {(one.seed, one.name): one.config for one in pipeline.plan(cfg)}
    assert stages[3, "sf"].optim["lr"] == 0.5 and stages[4, "dr"].optim["lr"] == 0.1
    assert stages[4, "ssqp_dr"].model["pretrained"] == "/whisper"
    assert stages[4, "ssqp_dr"].model["encoder"] == {"model_type": "whisper"}
    assert stages[4, "sf_train"].output == "/out/seed-4/sf_train"


def test_a_pipeline_in_other_words_has_another_digest() -> None:
    change: Callable[[Stage], None]
    _, stages = planned("huang2021/table3", "mini")
    for stage, change in (
        (stages[0], lambda one: setattr(one.config.training, "max_steps", 7)),
        (stages[3], lambda one: one.config.model.update(num_hidden=7)),
        (stages[-1], lambda one: setattr(one.config, "data", "other")),
    ):
        before = digest(own_leaves(stage))
        changed = dataclasses.replace(
            stage, config=config.from_yaml(config.to_yaml(stage.config), type(stage.config))
        )
        change(changed)
        assert digest(own_leaves(changed)) != before
