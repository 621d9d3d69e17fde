"""The command lines of the research verbs: keys, groups, paths, folders, help, one-line errors."""

import importlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from sepdist import composing, slots
from sepdist.cli import compose
from sepdist.config import ConfigError, EvaluateConfig, RecogniseConfig, ShardConfig, TrainConfig
from sepdist.papers.schema import FigureConfig, PipelineConfig

GIVEN = ["corpus=overlap", "corpus.root=speech", "recogniser=faster_whisper", "output=out"]
NEEDED = ["name=n", "data.train=t", "data.validation=v", "training.max_steps=1"]
PATH = "~/läufe/a = b, [c] (d)/{e} f"
RESEARCH = ("train", "pipeline", "evaluate", "estimate", "recognise", "labels", "plot", "audit")
NAMES = {
    EvaluateConfig: "evaluate",
    FigureConfig: "plot",
    PipelineConfig: "pipeline",
    RecogniseConfig: "recognise",
    ShardConfig: "shard",
    TrainConfig: "train",
}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    monkeypatch.setattr(slots, "_named", [])

    def read(schema: type, words: Sequence[str]) -> Any:
        monkeypatch.setattr(sys, "argv", ["sepdist verb", *words])
        return compose.read_config(NAMES[schema], schema, "It.\n\n    sepdist verb key=1 \\\n    b")

    yield read
    composing.user_folders.clear()


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of the user's, by a relative name with a blank."""
    monkeypatch.chdir(tmp_path)
    files = {
        "model/tiny.yaml": "_target_: sepdist.models.conv_tasnet.ConvTasNet\nnum_speakers: 2\n",
        "experiment/mine.yaml": "# @package _global_\ndefaults:\n  - override /model: tiny\n"
        "name: mine\nseed: 7\ndata: {train: t, validation: v}\ntraining: {max_steps: 3}\n",
        "experiment/chain.yaml": "# @package _global_\nname: chain\nstages:\n"
        "  first: {experiment: mine}\n  second: {experiment: mine, uses: [first]}\n",
    }
    for name, text in files.items():
        path = tmp_path / "my configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return "my configs"


def test_a_path_as_the_model_is_no_choice_of_a_group(read) -> None:
    cfg = read(RecogniseConfig, ["model=runs/a=b (c)", *GIVEN])
    assert cfg.model == "runs/a=b (c)"
    assert (cfg.corpus["num_mixtures"], cfg.recogniser["beam_size"]) == (100, 5)
    assert cfg.conditions == ["OV10", "OV20", "OV30", "OV40"]
    assert read(RecogniseConfig, GIVEN).model is None
    assert read(RecogniseConfig, ["model=null", *GIVEN]).model is None
    scored = read(EvaluateConfig, ["model=conv_tasnet", "data=1", "output=x", "max_seconds=2.5"])
    assert scored == EvaluateConfig("conv_tasnet", "1", "x", max_seconds=2.5)


@pytest.mark.parametrize("key", ["run_dir", "data.train", "data.cache_dir", "init.weights"])
def test_any_path_is_the_value_of_a_string_field_as_it_stands(read, key: str) -> None:
    cfg = read(TrainConfig, [*NEEDED, f"{key}={PATH}"])
    for name in key.split("."):
        cfg = getattr(cfg, name)
    assert cfg == PATH


def test_quotes_and_references_mean_what_they_mean_to_hydra(read) -> None:
    cfg = read(TrainConfig, [*NEEDED, "data.train='a, b'", "run_dir=${data_root}/${name}"])
    assert (cfg.data.train, cfg.run_dir) == ("a, b", "data/n")


@pytest.mark.parametrize("value", [PATH, "/a=b", "~/x", "a/b,c", "a (b)", "it's/x", "back\\slash"])
def test_a_path_below_a_group_is_quoted_where_hydras_grammar_cannot_read_it(
    read, value: str
) -> None:
    cfg = read(ShardConfig, ["corpus=librispeech", f"corpus.root={value}", "output=o"])
    assert cfg.corpus["root"] == value


def test_hydras_grammar_is_valid(read) -> None:
    words = ["optim={lr: 0.5}", "+optim.betas=[0.5, 0.9]", "++optim.eps=1e-3", "init.reinit=[a,b]"]
    cfg = read(TrainConfig, [*NEEDED, *words, "~optim.weight_decay", "objective=soft_pit"])
    assert cfg.optim == {
        "_target_": "torch.optim.Adam",
        "lr": 0.5,
        "fused": None,
        "betas": [0.5, 0.9],
        "eps": 0.001,
    }
    assert cfg.init.reinit == ["a", "b"] and cfg.objective["_target_"].endswith("SoftPit")


def test_a_title_of_a_figure_may_have_dots_blanks_and_parentheses(read) -> None:
    words = ["runs.from scratch=a", "runs.PT-FT v1.5 (SE, 10%)=runs/b=c", "title=A, B", "output=o"]
    assert read(FigureConfig, words) == FigureConfig(
        {"from scratch": "a", "PT-FT v1.5 (SE, 10%)": "runs/b=c"}, "o", "A, B"
    )


@pytest.mark.parametrize(
    ("schema", "word", "message"),
    [
        (EvaluateConfig, "modl=x", "no key 'modl': there are model, data, output"),
        (EvaluateConfig, "corpus=demo", "no key 'corpus'"),
        (EvaluateConfig, "--verbose", "cannot read '--verbose': give KEY=VALUE"),
        (EvaluateConfig, "-m", "cannot read '-m'"),
        (EvaluateConfig, "model", "cannot read 'model'.*as in: sepdist verb key=1 b$"),
        (
            EvaluateConfig,
            "num_workers=few",
            "^num_workers=few: give a whole number from 0 to 65536$",
        ),
        (EvaluateConfig, "num_workers=2", "no value given for data, model, output"),
        (EvaluateConfig, "num_workers=1,2", "num_workers=1,2: a sweep.*sepdist train -m"),
        (EvaluateConfig, "--cfg=all", "invalid choice: 'all'"),
        (EvaluateConfig, "--config-dir=no where", "no where: there is no such folder"),
        (RecogniseConfig, "corpus=none", "no corpus 'none': there are .*libricss"),
        (TrainConfig, "training.max_stepz=1", r"no key 'training.max_stepz': .*max_steps"),
        (TrainConfig, "optim.rate=1", "no key 'optim.rate': there are lr, weight_decay, fused$"),
        (TrainConfig, "name=${nosuch}", "no value given for data.train"),
        (TrainConfig, "experiment=demo/fine", "no experiment 'demo/fine': .*demo/finetune"),
        (TrainConfig, "run_dir=runs/x", "no value given for .*name, training.max_steps"),
        (TrainConfig, "hydra.searchpath=[nowhere]", "nowhere: there is no such folder"),
        (PipelineConfig, "experiment=demo/pretrain", "no experiment .*huang2021/table1"),
        (PipelineConfig, "stages.a.titel=x", r"no key 'stages.a.titel': .*title"),
        (PipelineConfig, "seeds=[0,1", r"cannot read 'seeds=\[0,1' from its end on"),
    ],
)
def test_a_wrong_word_is_refused_in_one_line_that_names_it(
    read, schema: type, word: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(schema, [word])
    assert "\n" not in str(caught.value)


def test_experiments_and_models_of_the_users_folder_are_found_by_name(read, mine: str) -> None:
    cfg = read(TrainConfig, ["experiment=mine", "--config-dir", mine, "seed=8"])
    assert (cfg.name, cfg.seed, cfg.model["num_speakers"]) == ("mine", 8, 2)
    assert cfg == read(TrainConfig, [f"--config-dir={mine}", "experiment=mine", "seed=8"])
    assert cfg == read(TrainConfig, [f"hydra.searchpath=[{mine}]", "experiment=mine", "seed=8"])
    with pytest.raises(ConfigError, match=r"no model 'x': there are .*sepformer.*tiny"):
        read(TrainConfig, ["--config-dir", mine, "model=x"])
    Path(mine, "experiment", "bare.yaml").write_text("training: {max_steps: 3}\n")
    with pytest.raises(ConfigError, match=r"In 'experiment/bare': .* line # @package _global_$"):
        read(TrainConfig, ["--config-dir", mine, "experiment=bare"])
    with pytest.raises(ConfigError, match="no experiment 'mine'"):  # without the folder
        read(TrainConfig, ["experiment=mine"])


def test_the_stages_of_a_pipeline_find_the_users_folder_too(read, mine: str) -> None:
    from sepdist.papers.pipeline import plan

    given = ["--config-dir", mine, "experiment=chain", "output=o", "plugins=[json]"]
    first, second = plan(read(PipelineConfig, given))
    assert (first.config.name, first.config.training.max_steps) == ("chain-first-0", 3)
    assert second.config.init.weights == first.folder == "o/seed-0/first"
    assert first.config.plugins == second.config.plugins == ["json"]
    with pytest.raises(ConfigError, match=r"no experiment 'x': .*, chain(,|$)"):
        read(PipelineConfig, ["--config-dir", mine, "experiment=x"])


@pytest.mark.parametrize(
    "text", ["defaults:\n  - broken\n", "a: [", "a: " + "[" * 5000, "name: ${nosuch}", "- a", "\0"]
)
def test_a_broken_experiment_is_an_error_of_one_line(read, text: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "broken.yaml").write_text(f"# @package _global_\n{text}")
    for more in ([], ["--cfg", "job"]):
        with pytest.raises(ConfigError) as caught:
            read(TrainConfig, [f"--config-dir={tmp_path}", "experiment=broken", *NEEDED[1:], *more])
        assert "\n" not in str(caught.value)


def test_plugins_are_imported_when_the_config_is_read(
    read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_plugin_of_a_test.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "my_plugin_of_a_test" not in sys.modules
    cfg = read(TrainConfig, [*NEEDED, "plugins=[my_plugin_of_a_test]"])
    assert cfg.plugins == ["my_plugin_of_a_test"] and "my_plugin_of_a_test" in sys.modules


def test_cfg_job_prints_the_config_with_its_references_resolved(
    read, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        read(TrainConfig, [*NEEDED, "--cfg", "job", "name=a, b"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert exit_.value.code == 0 and shown["run_dir"] == "runs/a, b"
    with pytest.raises(SystemExit):
        read(TrainConfig, ["--cfg=job"])
    assert yaml.safe_load(capsys.readouterr().out)["run_dir"] == "runs/${name}"


@pytest.mark.parametrize("verb", RESEARCH)
def test_help_has_the_usage_the_docstring_and_every_key(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"sepdist {verb}", "cluster=gpu", "--help"])
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module(f"sepdist.cli.{verb}").main()
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: sepdist {verb} KEY=VALUE ...\n")
    assert f"    sepdist {verb} " in shown and max(map(len, shown.splitlines())) <= 100
    assert re.search(r"^  --config-dir=DIR +your own folder", shown, re.M)
    place = r"run_dir=(\?\?\?|runs/\$\{name\})" if verb in ("train", "audit") else r"output="
    assert re.search(rf"^  {place}.* +(the PNG file|(a )?folder or s3://)", shown, re.M)


def test_help_of_train_has_nested_keys_and_the_options_of_groups(
    mine: str, read, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        read(TrainConfig, ["--help", "--config-dir", mine])
    shown = capsys.readouterr().out
    for line in (
        r"  cluster=local +gpu, local",
        r"  training\.keep_last=2 +newest checkpoints to keep",
        r"  scale=null +mini, real",
        r" +.*huang2021/wsj0_scratch, mine",
    ):
        assert re.search(rf"^{line}$", shown, re.M), line
    assert "tiny" in shown and "chain" not in shown  # that is for sepdist pipeline
