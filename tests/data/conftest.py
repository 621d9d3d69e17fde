"""Fixtures of the tests of data sets."""

from pathlib import Path

import pytest

from tests.support.clips import hiss, write


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "set")
    return f"s3://{request.getfixturevalue('bucket')}/sets/train"


@pytest.fixture(scope="module")
def voices(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("voices") / "set")


@pytest.fixture(scope="module")
def noises(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("noises") / "set", (2, 3), lambda _: "noise", hiss)
