"""The command lines of the research verbs: keys, groups, help and one-line errors."""

import re
import sys
from collections.abc import Sequence

import pytest

from sepdist.cli import compose, estimate, evaluate, labels, recognise
from sepdist.config import ConfigError, EvaluateConfig, RecogniseConfig

GIVEN = ["corpus=overlap", "corpus.root=speech", "recogniser=faster_whisper", "output=out"]
VERBS = {"evaluate": evaluate, "estimate": estimate, "labels": labels, "recognise": recognise}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch):
    def read(schema: type, words: Sequence[str]):
        monkeypatch.setattr(sys, "argv", ["sepdist verb", *words])
        name = "evaluate" if schema is EvaluateConfig else "recognise"
        return compose.read_config(name, schema, "What it does.")

    return read


def test_a_path_as_the_model_is_no_choice_of_a_group(read) -> None:
    cfg = read(RecogniseConfig, ["model=runs/a=b (c)", *GIVEN])
    assert cfg.model == "runs/a=b (c)"
    assert (cfg.corpus["num_mixtures"], cfg.recogniser["beam_size"]) == (100, 5)
    assert cfg.conditions == ["OV10", "OV20", "OV30", "OV40"]
    assert read(RecogniseConfig, GIVEN).model is None
    assert read(RecogniseConfig, ["model=null", *GIVEN]).model is None
    scored = read(EvaluateConfig, ["model=conv_tasnet", "data=1", "output=x", "max_seconds=2.5"])
    assert scored == EvaluateConfig("conv_tasnet", "1", "x", max_seconds=2.5)


@pytest.mark.parametrize(
    ("schema", "word", "message"),
    [
        (EvaluateConfig, "modl=x", "no key 'modl'; --help lists the keys"),
        (EvaluateConfig, "corpus=demo", "no key 'corpus'"),
        (EvaluateConfig, "--verbose", "cannot read '--verbose': give KEY=VALUE"),
        (EvaluateConfig, "model", "cannot read 'model'"),
        (EvaluateConfig, "num_workers=few", "num_workers=few.*'few'.*to Integer$"),
        (EvaluateConfig, "num_workers=2", "no value given for data, model, output"),
        (RecogniseConfig, "corpus=none", "Could not find 'corpus/none'.*libricss"),
        (RecogniseConfig, "corpus.rot=x", r"corpus\.rot"),
    ],
)
def test_a_wrong_word_is_refused_in_one_line_that_names_it(
    read, schema: type, word: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(schema, [word])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_the_usage_the_docstring_and_every_key(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"sepdist {verb}", "num_workers=0", "--help"])
    with pytest.raises(SystemExit) as exit_:
        VERBS[verb].main()
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: sepdist {verb} KEY=VALUE ...\n")
    assert f"    sepdist {verb} model=" in shown
    assert re.search(r"^  output=\?\?\? +folder or s3://", shown, re.M)
    assert re.search(r"^  num_workers=1 +Ray tasks; 0 = in this process$", shown, re.M)
