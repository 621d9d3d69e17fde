"""Three faults of three kinds at random steps on a small Ray; the benchmark takes twenty of all kinds."""

import json

import pytest

from tests.support.runs import program

pytestmark = pytest.mark.xdist_group(
    "ray"
)  # one after the other: they share two cores and take time


def test_a_run_through_three_faults_ends_with_the_bits_of_one_left_alone() -> None:
    faults = ["--faults", "3", "--kinds", "kill,livelock,driver", "--steps", "45", "--workers", "2"]
    output = program("-m", "benchmarks.chaos", *faults, timeout=900)
    found = json.loads(output.strip().splitlines()[-1])
    assert found["same_losses"] and found["same_weights"]
    assert (found["lost"], found["repeated"]) == (0, 0)
    assert {kind: told["count"] for kind, told in found["by_kind"].items()} == {
        "kill": 1,
        "livelock": 1,
        "driver": 1,
    }
