"""Faults of several kinds disturb a run on a small Ray, which ends with the same bits.

The benchmark of the same name inflicts twenty faults of all kinds.
"""

import json

import pytest

from tests.support.runs import program


@pytest.mark.seconds(110)
@pytest.mark.parametrize(
    ("kinds", "steps"),
    [("kill,driver", 200), pytest.param("kill,livelock,driver", 300, marks=pytest.mark.slow)],
)
def test_a_run_through_faults_ends_with_the_bits_of_one_left_alone(kinds: str, steps: int) -> None:
    names = kinds.split(",")
    faults = ["--faults", str(len(names)), "--kinds", kinds, "--steps", str(steps)]
    output = program("-m", "benchmarks.chaos", "--quick", "--workers", "2", *faults, timeout=900)
    found = json.loads(output.strip().splitlines()[-1])
    assert found["same_losses"] and found["same_weights"]
    assert (found["lost"], found["repeated"]) == (0, 0)
    counts = {kind: numbers["count"] for kind, numbers in found["by_kind"].items()}
    assert counts == dict.fromkeys(names, 1)
