"""The contract of objectives: default hooks where an objective has none, else its own."""

import pytest
import torch

from sepdist.objectives.contract import (
    OUTPUT_RULES,
    Objective,
    mean_of,
    measured,
    speakers_of,
    with_defaults,
)
from sepdist.objectives.multitask import MultiTask
from sepdist.objectives.separation import Separation


def test_the_defaults_are_the_hooks_of_the_protocol_and_change_nothing() -> None:
    assert all(hasattr(Objective, name) for name in Objective.__annotations__)
    plain = with_defaults(Separation())
    assert plain.state_dict() == plain.lineage() == {} and plain.stop_reason is None
    plain.check_model(torch.nn.Identity())
    plain.observe({"score": 1.0})
    plain.load_state_dict({})
    outputs = torch.randn(1, 3, 10)
    rules = {name: getattr(plain, name) for name in OUTPUT_RULES}
    assert torch.equal(speakers_of(outputs, **rules), outputs)


@pytest.mark.parametrize(
    ("name", "value"), [("num_extra_outputs", 1), ("data_sets", ("main", "x"))]
)
def test_hooks_that_an_objective_defines_are_kept(name: str, value: object) -> None:
    objective = MultiTask("x")
    assert with_defaults(objective) is objective and getattr(objective, name) == value


class WithWindow(torch.nn.Module):
    """An objective as people write them: a module with a constant, and a hook of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(8))

    def observe(self, means: object) -> None:
        self.seen = means


def test_the_state_of_an_objective_that_is_a_module_is_not_taken_for_the_hook() -> None:
    plain = with_defaults(WithWindow())
    assert plain.state_dict() == {}
    plain.load_state_dict({})
    plain.observe({"score": 1.0})
    assert plain.seen == {"score": 1.0}

    class WithState(WithWindow):
        def state_dict(self) -> dict:  # type: ignore[override]
            return {"count": 3}

    assert with_defaults(WithState()).state_dict() == {"count": 3}


def test_the_mean_of_a_metric_is_over_the_items_that_have_a_value() -> None:
    has_value = torch.tensor([True, False, True])
    for metric, expected in (
        (measured(torch.tensor([1.0, 50.0, 4.0]), has_value), (2.5, 2)),
        (measured(torch.tensor([1.0, torch.nan, 4.0]), has_value), (2.5, 2)),
        (measured(torch.tensor([7.0, 8.0, 9.0]), torch.zeros(3) > 0), (0.0, 0)),
        (torch.tensor([2.0, 4.0, 9.0]), (5.0, 3)),
        (torch.tensor(3.5), (3.5, 1)),
        (torch.zeros(0), (0.0, 0)),
    ):
        mean, count = mean_of(metric)
        assert (float(mean), int(count)) == expected and mean.dtype == torch.float64
    broken = measured(torch.tensor([1.0, torch.nan, 4.0]), torch.ones(3) > 0)
    assert torch.isnan(mean_of(broken)[0]), "a value that is no number is not taken for none"
