"""Files of strangers run nothing, read nothing and exhaust nothing: models, lineages, run_dirs.

They name functions of sepdist, of Python or of torch, with arguments that would leave a mark in the
folder `home`.
"""

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sepdist import config, slots
from sepdist.config import ConfigError, TrainConfig
from sepdist.inference.export import load_export, load_separator
from sepdist.training import loop
from sepdist.training.checkpoint import CheckpointError
from tests.support.exports import MODEL, PUT, stranger
from tests.support.runs import frozen, program

# What a stranger may write into a model.yaml.

SYSTEM = "!!python/object/apply:os.system ['touch ~/mark']"
SSQP = {"_target_": "sepdist.models.ssqp.SSQPNet"}
SANDGLASSET = {"_target_": "sepdist.models.sandglasset.Sandglasset"}
ATTACKS: dict[str, Any] = {
    "a put nested": {"model": MODEL | {"num_filters": PUT}},
    "a put with binary data": yaml.safe_dump(
        {"model": MODEL | {"num_filters": PUT | {"data": b"x"}}}
    ),
    "a put as the model": {"model": PUT},
    "a put as the rate": {"model": MODEL, "sample_rate": PUT},
    "a put beside the model": {"model": MODEL, "num_loudest": PUT},
    "put_file": {"model": MODEL | {"stride": PUT | {"_target_": "sepdist.storage.put_file"}}},
    "remove": {"model": MODEL | {"stride": {"_target_": "sepdist.storage.remove", "url": "~"}}},
    "os.system": {"model": {"_target_": "os.system", "command": "touch ~/mark"}},
    "subprocess.run": {"model": {"_target_": "subprocess.run", "args": ["touch", "~/mark"]}},
    "a python tag": f"model: {SYSTEM}\nsample_rate: 8000\n",
    "a python tag nested": f"model: {{_target_: x, a: [{SYSTEM}]}}\nsample_rate: 8000\n",
    "a python name": "model: !!python/name:os.system ''\nsample_rate: 8000\n",
    "an alias bomb": "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\nmodel: {_target_: x}\n",
    "a merge key": "a: &a {_target_: x}\nmodel: {<<: *a}\nsample_rate: 8000\n",
    "a deep nest": "model: " + "[" * 100_000,
    "a number without digits": "model: {_target_: x, a: !!int ''}\nsample_rate: 8000\n",
    "a boolean in words": "model: {_target_: x, a: !!bool maybe}\nsample_rate: 8000\n",
    "a time of many digits": f"model: {{_target_: x, a: {'59:' * 9000}59.5}}\nsample_rate: 8000\n",
    "a deep module": {"model": {"_target_": "sepdist.models." + "x." * 9000}},
    "a large text": "model: {_target_: x}\n#" + "x" * 1_000_000,
    "a date": "model: {_target_: x, a: 2020-01-01}\nsample_rate: 8000\n",
    "nothing": "",
    "a list": "- model\n",
    "a text": "model",
    "not text": b"\xff\xfe\x00",
    "no sample rate": "model: {_target_: x.y}\n",
    "a rate in words": {"model": MODEL, "sample_rate": "8000"},
    "a rate of 0": {"model": MODEL, "sample_rate": 0},
    "a boolean rate": {"model": MODEL, "sample_rate": True},
    "an infinite rate": {"model": MODEL, "sample_rate": float("inf")},
    "a rate of 10 GHz": {"model": MODEL, "sample_rate": 10**10},
    "no target": {"model": {"num_speakers": 2}},
    "a wrong type": {"model": MODEL | {"num_filters": "many"}},
    "a wrong name": {"model": MODEL | {"num_filterz": 4}},
    "a zero size": {"model": MODEL | {"stride": 0}},
    "a negative size": {"model": MODEL | {"num_filters": -4}},
    "a huge size": {"model": MODEL | {"num_filters": 10**15}},
    "a large size": {"model": MODEL | {"num_filters": 900_000, "num_hidden": 900_000}},
    "a large number of blocks": {"model": MODEL | {"num_repeats": 1_000_000}},
    "a long stride": {"model": MODEL | {"stride": 10**9, "kernel_size": 10**9}},
    "a distant tap": {"model": MODEL | {"num_blocks": 29}},
    "many taps": {"model": MODEL | {"num_taps": 999_999}},
    "frames upon frames": {"model": MODEL | {"stride": 1, "kernel_size": 999_999}},
    "a coarse block": {"model": SANDGLASSET | {"num_blocks": 1_000_000}},
    "a long chunk": {"model": {"_target_": "sepdist.models.dptnet.DPTNet", "chunk_size": 999_998}},
    "many outputs": {"model": MODEL, "num_extra_outputs": 10**9},
    "an objective": {"model": {"_target_": "sepdist.objectives.separation.Separation"}},
    "an optimizer": {"model": {"_target_": "torch.optim.Adam"}},
    "a corpus": {"model": {"_target_": "sepdist.corpora.demo.DemoCorpus"}},
    "another model's weights": {
        "model": {"_target_": "sepdist.inference.export.load_estimator", "url": "~"}
    },
    "weights from a folder": {"model": SSQP | {"pretrained": "~"}},
    "weights from the hub": {"model": SSQP | {"pretrained": "someone/something"}},
    "code from the hub": {
        "model": SSQP
        | {"encoder": {"model_type": "wav2vec2", "_attn_implementation": "someone/kernel"}}
    },
    "another encoder": {"model": SSQP | {"encoder": {"model_type": "llama"}}},
    "a method": {"model": SSQP | {"encoder": {"model_type": "wav2vec2", "to_dict": 1}}},
    "a plug-in": {"model": {"_target_": "antigravity.Model"}},
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_strangers_model_is_refused_in_one_line_and_leaves_no_mark(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, home = stranger(tmp_path / "model", ATTACKS[name]), tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        load_separator(str(folder))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    assert any(word in message for word in ("model", "pretrained", "encoder", "Conv")), message
    assert os.listdir(home) == []


def test_an_encoder_cannot_choose_code_from_the_hub_in_a_config_either() -> None:
    node = ATTACKS["code from the hub"]["model"]
    with pytest.raises(ValueError, match="no _attn_implementation"):
        slots.build("model", node)


def test_the_command_refuses_a_strangers_model_with_one_line(tmp_path: Path) -> None:
    folder = stranger(tmp_path / "model", ATTACKS["a put nested"])
    words = ("separate", "--model", str(folder), "--output", str(tmp_path / "out"), "a.wav")
    shown = program("-m", "sepdist", *words, expect=1, HOME=str(tmp_path))
    assert shown.startswith("error: model.num_filters: no part may stand here")
    assert len(shown.splitlines()) == 1 and not (tmp_path / "mark").exists()


def test_a_lineage_is_shown_and_never_acted_on(tmp_path: Path) -> None:
    folder = stranger(tmp_path / "model", {"model": MODEL})
    lineage = {"parent": PUT, "estimator": PUT | {"url": str(tmp_path / "mark")}, "run": "${x}"}
    (folder / "lineage.json").write_text(json.dumps(lineage))
    assert load_export(str(folder)).lineage == lineage
    for text in ("[]", "3", '{"a": ', "[" * 100_000, "\xff"):
        (folder / "lineage.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(CheckpointError, match=r"lineage\.json"):
            load_export(str(folder))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "url", ["https://host/model", "file:///etc/passwd", "ftp://host/x", "/etc/passwd", "~", ""]
)
def test_the_url_of_an_estimator_names_a_folder_or_a_prefix_alone(url: str) -> None:
    with pytest.raises((ValueError, OSError)):
        slots.build("objective", guided(url))


@pytest.mark.parametrize("name", ["a put nested", "os.system", "code from the hub", "a plug-in"])
def test_a_strangers_model_is_refused_as_an_estimator_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = stranger(tmp_path / "model", ATTACKS[name])
    with pytest.raises((CheckpointError, ConfigError)):
        slots.build("objective", guided(str(folder)))
    assert not (tmp_path / "mark").exists()


def guided(url: str) -> dict[str, Any]:
    """A semi-supervised objective guided by the estimator at `url`."""
    estimator = {"_target_": "sepdist.inference.export.load_estimator", "url": url}
    target = "sepdist.objectives.semisupervised.SemiSupervised"
    node: dict[str, Any] = {"_target_": target, "estimator": estimator}
    return node | {"epoch_samples": 10, "labelled_share": 0.5}


# A run_dir of a stranger: its frozen config is read by `loop`, by `plot` and by resuming.

SLOTS_OF_A_RUN = ["model", "objective", "engine", "optim", "data.mixing"]


@pytest.mark.parametrize("key", [*SLOTS_OF_A_RUN, "objective.estimator", "model.num_filters"])
def test_a_frozen_config_runs_no_function(
    key: str,
    tiny_data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = Path(frozen(tiny_data, tmp_path / "run", "training.max_steps=1"))
    values = yaml.safe_load(path.read_text())
    inner = values
    *outer, last = key.split(".")
    for name in outer:
        inner = inner[name]
    inner[last] = PUT | {"url": str(tmp_path / "mark"), "lr": 0.1}
    path.write_text(yaml.safe_dump(values))
    monkeypatch.setattr(sys, "argv", ["loop", str(path)])
    with pytest.raises(SystemExit):
        loop.main()
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "_target_" in error
    assert not (tmp_path / "mark").exists()


BOMB = "a: &a [1, 2]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise("abcdefg")
)


@pytest.mark.parametrize(
    "text",
    [BOMB, "[" * 100_000, "- a", "3", "a: &a [*a]", f"name: {SYSTEM}", "seed: !!int ''", "a: \0"],
)
def test_a_frozen_config_is_plain_yaml(text: str) -> None:
    with pytest.raises(ConfigError, match=r"plain YAML|a mapping") as caught:
        config.from_yaml(text, TrainConfig)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value", ["${oc.env:SECRET}", "a${oc.env:SECRET}", '"\\x24{oc.env:SECRET}"']
)
def test_a_frozen_config_reads_no_environment(
    value: str, tiny_data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "key")
    path = Path(frozen(tiny_data, tmp_path / "run", "training.max_steps=1"))
    text = path.read_text().replace("name: demo-finetune", f"name: {value}")
    assert "SECRET" in text
    with pytest.raises(ConfigError, match="reference"):
        config.from_yaml(text, TrainConfig)
