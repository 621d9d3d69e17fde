"""Which graph a call of a captured model replays; for want of a GPU, capturing is pretended."""

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from sepdist.training.capture import MAX_GRAPHS, Captured


class Double(nn.Module):
    """Twice the input; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor, factor: float = 2.0) -> Tensor:
        self.calls += 1
        return factor * x


@pytest.fixture
def replayed() -> Iterator[list[int]]:
    """The numbers of the graphs that are replayed, in turn."""
    replays: list[int] = []
    made: list[Any] = []

    def capture(model: nn.Module, sample: Any, **_: Any) -> Callable[[Tensor], Tensor]:
        number = len(made)
        made.append(sample)

        def replay(x: Tensor) -> Tensor:
            assert x.shape == sample[0].shape
            replays.append(number)
            return 2 * x

        return replay

    random = {"get_rng_state": lambda device: torch.zeros(1), "set_rng_state": lambda *_: None}
    with mock.patch.multiple("torch.cuda", make_graphed_callables=capture, **random):
        yield replays


def test_each_call_of_a_pass_has_a_graph_of_its_own_and_the_next_pass_replays_them(
    replayed: list[int],
) -> None:
    model = Double()
    captured = Captured(model)
    for _ in range(2):
        captured.begin()
        for length in (4, 4, 6):
            assert captured(torch.ones(1, length)).sum() == 2 * length
    assert replayed == [0, 1, 2, 0, 1, 2]
    assert model.calls == 0


def test_without_gradients_with_options_and_after_enough_graphs_the_model_is_called(
    replayed: list[int],
) -> None:
    model = Double()
    captured = Captured(model)
    with torch.no_grad():
        captured(torch.ones(1, 4))
    assert captured(torch.ones(1, 4), factor=3.0).sum() == 12
    assert (replayed, model.calls) == ([], 2)
    for length in range(1, MAX_GRAPHS + 3):
        captured.begin()
        captured(torch.ones(1, length))
    assert replayed == [*range(MAX_GRAPHS)]
    assert model.calls == 4


def test_what_an_objective_asks_of_a_model_it_finds() -> None:
    assert Captured(Double()).calls == 0
