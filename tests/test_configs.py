"""Every YAML file under configs/ composes and builds; a count shows that none escapes."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from sepdist import composing, config, slots
from sepdist.config import ConfigError
from sepdist.papers.pipeline import plan
from sepdist.papers.schema import PipelineConfig

CONFIGS = Path(config.config_dir())


SCHEMAS = {"train": config.TrainConfig, "recognise": config.RecogniseConfig}
SCHEMAS["pipeline"] = PipelineConfig


def composed(name: str, *overrides: str) -> Any:
    schema: Any = SCHEMAS[name]
    return config.typed(composing.compose(name, overrides, schema), schema)


def files(group: str) -> list[str]:
    return sorted(
        str(p.relative_to(CONFIGS / group).with_suffix(""))
        for p in (CONFIGS / group).rglob("*.yaml")
    )


def test_every_yaml_file_is_a_primary_config_or_in_a_group_that_a_test_here_composes() -> None:
    primary = {"train.yaml", "shard.yaml", "evaluate.yaml", "recognise.yaml", "pipeline.yaml"}
    groups = {
        "model",
        "objective",
        "engine",
        "optim",
        "cluster",
        "scale",
        "experiment",
        "corpus",
        "mixing",
    }
    groups |= {"recogniser"}
    found = {str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.yaml")}
    assert primary <= found
    assert {
        name for name in found if name not in primary and name.split("/")[0] not in groups
    } == set()
    assert len(found) == NUM_CONFIGS


NUM_CONFIGS = 88


@pytest.mark.parametrize("name", files("model"))
def test_every_model_builds_a_module(name: str) -> None:
    assert isinstance(
        built(composed("train", f"model={name}", *NEEDED).model),
        nn.Module,
    )


def built(node: dict[str, Any]) -> Any:
    """Build a model; without weights, not even random ones, where they are on a model hub."""
    if not node.get("pretrained"):
        return slots.build("model", node)
    with torch.device("meta"):
        return slots.build("model", node | {"pretrained": None})


def estimator(folder: Path) -> Path:
    """An export to load as an SI-SNR estimator; whether it is one shows when it is called."""
    node = yaml.safe_load((CONFIGS / "model" / "conv_tasnet_small.yaml").read_text()) | {
        "num_speakers": 1
    }
    (folder / "model.yaml").write_text(yaml.safe_dump({"model": node, "sample_rate": 8000}))
    save_file(slots.build("model", node).state_dict(), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", files("objective"))
def test_every_objective_builds_a_callable(name: str, tmp_path: Path) -> None:
    given = []
    if name == "fixed_permutations":
        (tmp_path / "permutations.csv").write_text("id,permutation\na,0\n")
        given.append(f"objective.permutations={tmp_path}/permutations.csv")
    if name == "semisupervised":
        given += [
            f"objective.estimator.url={estimator(tmp_path)}",
            "objective.labelled_share=0.1",
            "objective.epoch_samples=1",
        ]
    cfg = composed("train", f"objective={name}", *NEEDED, *given)
    assert callable(slots.build("objective", cfg.objective))


@pytest.mark.parametrize("group", ["engine", "optim", "cluster"])
def test_every_option_of_the_fixed_groups_composes(group: str) -> None:
    for name in files(group):
        cfg = composed("train", f"{group}={name}", *NEEDED)
        if group in slots.SLOTS:
            slots.resolve(group, getattr(cfg, group)["_target_"])


SMALL_MODELS = [name.removeprefix("mini/") for name in files("scale") if "/" in name]


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_scale_mini_takes_the_small_size_of_a_model(name: str) -> None:
    both = [
        composed("train", f"model={name}", *scale, *NEEDED).model for scale in ([], ["scale=mini"])
    ]
    assert both[0].keys() == both[1].keys()
    large, small = (sum(one.numel() for one in built(node).parameters()) for node in both)
    assert small < 1e6 < large


@pytest.mark.parametrize("name", files("mixing"))
def test_every_mixing_is_a_node_of_the_data_section_with_known_arguments(name: str) -> None:
    node = composed("train", f"mixing={name}", *NEEDED).data.mixing
    known = inspect.signature(slots.resolve("mixing", node["_target_"])).parameters
    assert {"dataset", "seed", "num_sources", "crop_seconds"} <= known.keys() and node.keys() - {
        "_target_"
    } <= known.keys()


PIPELINES = [name for name in files("experiment") if name.startswith("real/")]


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_composes_with_all_its_stages(name: str) -> None:
    given = ["vars.speech=s", "vars.noise=n"] if name in ("real/data", "real/separator") else []
    cfg = composed("pipeline", f"experiment={name}", *given)
    stages = plan(cfg)
    assert {stage.name for stage in stages} == cfg.stages.keys()
    assert {stage.seed for stage in stages} == set(cfg.seeds)


@pytest.mark.parametrize("scale", ["", "mini"])
@pytest.mark.parametrize("name", sorted(set(files("experiment")) - set(PIPELINES)))
def test_every_experiment_composes_at_both_scales_and_its_parts_build(
    name: str, scale: str, tmp_path: Path
) -> None:
    given = [] if name.startswith("demo/") else ["data.train=a", "data.validation=b"]
    if name.startswith(("dang2023/sslm", "dang2023/mixit")):
        given.append("data.extra=[{name: unlabelled, url: c, weight: 1.0}]")
    if name.startswith("dang2023/sslm"):
        given.append(f"objective.estimator.url={estimator(tmp_path)}")
    if scale:
        given.append(f"scale={scale}")
    cfg = composed("train", f"experiment={name}", *given)
    assert isinstance(built(cfg.model), nn.Module)
    assert callable(slots.build("objective", cfg.objective))
    assert cfg.name != "???" and cfg.training.max_steps > 0
    assert cfg.cluster.num_workers == 2 or not scale


@pytest.mark.parametrize("name", files("corpus"))
def test_every_corpus_is_a_class_with_records(name: str) -> None:
    node = yaml.safe_load((CONFIGS / "corpus" / f"{name}.yaml").read_text())
    assert callable(slots.resolve("corpus", node["_target_"]).records)


@pytest.mark.parametrize("name", files("recogniser"))
def test_every_recogniser_is_called_and_takes_its_keys_and_a_device(name: str) -> None:
    given = ["corpus=overlap", "corpus.root=a", "output=b"]
    cfg = composed("recognise", f"recogniser={name}", *given)
    recogniser = slots.resolve("recogniser", cfg.recogniser["_target_"])
    assert callable(recogniser.__call__)
    assert {"device", *cfg.recogniser} - {"_target_"} == inspect.signature(
        recogniser
    ).parameters.keys()


NEEDED = ["name=x", "data.train=a", "data.validation=b", "training.max_steps=1"]


def test_an_unknown_key_is_an_error_that_names_it() -> None:
    with pytest.raises(Exception, match="stepz"):
        composed("train", *NEEDED, "training.stepz=3")


def test_a_wrong_type_is_an_error_that_names_the_value() -> None:
    with pytest.raises(Exception, match="abc"):
        composed("train", *NEEDED, "training.max_steps=abc")


def test_a_missing_value_is_an_error_that_says_how_to_give_it() -> None:
    with pytest.raises(ConfigError, match=r"training\.max_steps"):
        composed("train", *NEEDED[:3])


def test_a_frozen_config_reads_back_equal() -> None:
    cfg = composed("train", *NEEDED)
    assert config.from_yaml(config.to_yaml(cfg), config.TrainConfig) == cfg


def test_the_experiment_wins_over_the_primary_config() -> None:
    cfg = composed("train", "experiment=demo/finetune")
    assert cfg.run_dir == "demo/runs/finetune"
