"""Random choices depend on (seed, purpose, position) and on nothing else."""

import itertools
import subprocess
import sys

from sepdist import seeding


def test_the_same_arguments_give_the_same_numbers_in_another_process() -> None:
    here = seeding.rng(3, "crop", 17).integers(0, 2**31, 4).tolist()
    code = (
        "from sepdist import seeding;"
        "print(seeding.rng(3, 'crop', 17).integers(0, 2**31, 4).tolist())"
    )
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert there.strip() == str(here)


def test_any_change_of_an_argument_gives_another_stream() -> None:
    arguments = [
        (0, "crop", 1),
        (1, "crop", 1),
        (0, "mix", 1),
        (0, "crop", 2),
        (0, "crop", 1, 0),
        (0, "crop", "1", "0x"),
    ]
    assert len({seeding.derive(*one) for one in arguments}) == len(arguments)


def test_neighbouring_positions_are_uncorrelated_uniforms() -> None:
    draws = [seeding.rng(0, "crop", position).random() for position in range(4000)]
    assert abs(sum(draws) / 4000 - 0.5) < 0.02
    lagged = sum((a - 0.5) * (b - 0.5) for a, b in itertools.pairwise(draws)) / 3999
    assert abs(lagged) < 0.01
