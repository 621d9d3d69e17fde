"""Fixed permutations: the table decides in training, PIT in evaluation; a bad table is an error."""

import itertools
from pathlib import Path

import pytest
import torch

from sepdist import config
from sepdist.metrics.si_snr import si_snr
from sepdist.models.conv_tasnet import ConvTasNet
from sepdist.objectives.fixed_permutations import FixedPermutations
from sepdist.objectives.separation import Separation
from tests.support.batches import Fixed, batch_of, values, voices
from tests.support.runs import frozen


def table(folder: Path, *ranks: object) -> str:
    path = folder / "permutations.csv"
    path.write_text(
        "id,permutation\n" + "".join(f"utterance{i},{rank}\n" for i, rank in enumerate(ranks))
    )
    return str(path)


@pytest.mark.parametrize("num_sources", [2, 3])
def test_in_training_the_loss_is_that_of_the_tables_assignment(
    num_sources: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    orders = list(itertools.permutations(range(num_sources)))
    sources = torch.randn(len(orders), num_sources, 300)
    estimates = sources + 0.5 * torch.randn_like(
        sources
    )  # so the best assignment is the identity, rank 0
    objective = FixedPermutations(table(tmp_path, *range(len(orders))))
    loss, metrics = objective(Fixed(estimates), batch_of(sources))
    expected = [
        -float(si_snr(estimates[i][list(order)], sources[i]).mean())
        for i, order in enumerate(orders)
    ]
    assert float(loss.detach()) == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert metrics["agreement"].tolist() == [1.0] + [0.0] * (len(orders) - 1)
    assert metrics["permutation"].tolist() == [0] * len(orders)


def test_in_evaluation_it_is_pit_and_needs_no_table(tmp_path: Path) -> None:
    sources = torch.randn(2, 2, 300)
    batch = batch_of(sources)
    batch.ids = ["other", "another"]
    model = Fixed(sources.flip(1) + 0.1 * torch.randn_like(sources)).eval()
    objective = FixedPermutations(table(tmp_path, 0))
    (loss, metrics), (expected, by_pit) = objective(model, batch), Separation()(model, batch)
    assert torch.equal(loss, expected) and metrics.keys() == by_pit.keys()
    with pytest.raises(ValueError, match=r"permutations\.csv has 1 permutations, none for other"):
        objective(model.train(), batch)


def test_some_hundred_steps_learn_the_assignment_of_the_table(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batch = batch_of(voices(2, 2, 2000))
    model = ConvTasNet(2, 64, 20, 10, 24, 48, 24, num_blocks=4, num_repeats=1, compile=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    objective = FixedPermutations(table(tmp_path, 1, 1))
    for _ in range(150):
        loss, metrics = objective(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    assert float(values(metrics["si_snri"]).min()) > 8 and metrics["permutation"].tolist() == [1, 1]


def test_a_relative_path_of_the_table_is_made_absolute_for_workers_elsewhere(
    tiny_data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    from sepdist.training.run import freeze

    monkeypatch.chdir(tmp_path)
    table(tmp_path, 0)
    cfg = config.load_frozen(
        frozen(
            tiny_data,
            tmp_path / "composed",
            "objective=fixed_permutations",
            "objective.permutations=permutations.csv",
        )
    )
    cfg.run_dir = str(tmp_path / "run")
    freeze(cfg, Console(quiet=True))
    assert config.load_frozen(f"{tmp_path}/run/config.yaml").objective["permutations"] == str(
        tmp_path / "permutations.csv"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,permutation\n", "is empty"),
        ("name,rank\na,0\n", "line 2: no id and permutation"),
        ("id,permutation\na,first\n", "line 2: no id and permutation"),
        ("id,permutation\na\n", "line 2: no id and permutation"),
        ("id,permutation\na,0\na,1\n", "line 3: a is 1 here and 0 above"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_with_the_line(
    text: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "permutations.csv").write_text(text)
    with pytest.raises(ValueError, match=words):
        FixedPermutations(str(tmp_path / "permutations.csv"))


def test_a_permutation_of_more_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="permutation 5 of utterance0, but 2 sources have 2"):
        FixedPermutations(table(tmp_path, 5))(
            Fixed(torch.randn(1, 2, 90)), batch_of(torch.randn(1, 2, 90))
        )
