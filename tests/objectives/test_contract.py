"""The contract of objectives: default hooks where an objective has none, else its own."""

import pytest
import torch

from sepdist.metrics.selection import speakers_of
from sepdist.objectives.contract import OUTPUT_RULES, Objective, with_defaults
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
