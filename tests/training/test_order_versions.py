"""A run goes on in the version of the data order under which it began, and without newer keys."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from sepdist import config
from sepdist.config import ConfigError, TrainConfig
from sepdist.training.run import freeze
from tests.support.runs import frozen, loop

OTHER_RUN = "holds a run of another config: {}. Choose another run_dir"


@pytest.fixture
def composed(tiny_data: dict[str, str], tmp_path: Path) -> TrainConfig:
    """A config that names no order, as `sepdist train` composes it."""
    path = Path(frozen(tiny_data, tmp_path / "run", "training.max_steps=1"))
    cfg = config.load_frozen(str(path))
    path.unlink()
    assert cfg.data.order is None
    return cfg


def started(cfg: TrainConfig, order: int | None) -> tuple[int | None, str]:
    """Freeze the run, given an order or none; returns its order and what the user sees."""
    cfg.data.order, shown = order, io.StringIO()
    freeze(cfg, Console(file=shown, soft_wrap=True))
    return config.load_frozen(f"{cfg.run_dir}/config.yaml").data.order, shown.getvalue()


def test_a_new_run_has_order_2_and_keeps_it(composed: TrainConfig) -> None:
    assert started(composed, None) == (2, "")
    assert started(composed, None) == started(composed, 2) == (2, "")
    with pytest.raises(ConfigError, match=OTHER_RUN.format("data.order was 2, is 1")):
        started(composed, 1)


def test_a_new_run_may_have_order_1(composed: TrainConfig) -> None:
    assert started(composed, 1) == (1, "")
    order, shown = started(composed, None)
    assert order == 1 and "data.order=1: the run began under it and goes on under it" in shown


def test_a_run_from_before_a_part_had_an_argument_goes_on_with_its_default_alone(
    composed: TrainConfig,
) -> None:
    composed.model["causal"], composed.engine["checkpoint_activations"] = False, False
    started(composed, None)
    path = Path(composed.run_dir) / "config.yaml"
    text = path.read_text()
    path.write_text(re.sub(r"  (causal|checkpoint_activations): false\n", "", text))
    assert len(path.read_text().splitlines()) == len(text.splitlines()) - 2
    assert started(composed, None) == (2, "")
    path.write_text(text.replace("  causal: false\n", ""))
    composed.model["causal"] = True
    with pytest.raises(ConfigError, match=OTHER_RUN.format("model.causal was False, is True")):
        started(composed, None)


def test_a_run_from_before_there_was_a_version_goes_on_under_order_1_and_says_so(
    composed: TrainConfig,
) -> None:
    started(composed, 1)
    path = Path(composed.run_dir) / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace("  order: 1\n", ""))
    assert path.read_text() != text and config.load_frozen(str(path)).data.order == 1
    with pytest.raises(ConfigError, match=OTHER_RUN.format("data.order was 1, is 2")):
        started(composed, 2)
    order, shown = started(composed, None)
    assert order == 1 and "the run began under it" in shown


def test_a_checkpoint_from_before_there_was_a_version_goes_on_under_order_1_alone(
    tiny_data: dict[str, str], tmp_path: Path
) -> None:
    path = Path(frozen(tiny_data, tmp_path / "run", "data.order=1", "training.max_steps=1"))
    loop(str(path))
    (state,) = (tmp_path / "run").glob("checkpoints/*/state.json")
    assert "order" not in json.loads(state.read_text()), "as versions without the key wrote it"
    text = path.read_text().replace("max_steps: 1", "max_steps: 2")
    path.write_text(text.replace("order: 1", "order: 2"))
    with pytest.raises(Exception, match=r"data changed since its checkpoint \(order was 1, is 2\)"):
        loop(str(path))
    path.write_text(text.replace("  order: 1\n", ""))
    loop(str(path))
    newest = max((tmp_path / "run").glob("checkpoints/*/state.json"))
    assert json.loads(newest.read_text())["samples_seen"] == 8
    assert "order" not in json.loads(newest.read_text())
