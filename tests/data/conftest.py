"""Fixtures of the tests of data sets."""

from pathlib import Path

import pytest


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "set")
    return f"s3://{request.getfixturevalue('bucket')}/sets/train"
