"""Fixtures of the whole suite, and the order of its tests.

`bucket` is what most tests of storage want: the name of a fresh bucket on a real S3 server, with
the environment set as a user sets it. The server is started by the first test that asks for it.
"""

import itertools
import multiprocessing
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from sepdist.config import ShardConfig
from sepdist.data.sharding import write_data_set
from tests.support.s3server import S3Server

# In a shell's background job Ctrl-C is ignored; some tests send one.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("suite", deadline=None)  # no assertion about time: machines differ
settings.load_profile("suite")

_NUMBERS = itertools.count()
# What a process that trains imports. torch's optimizers import _dynamo, DeepSpeed's ZeRO _inductor.
_TRAINING = (
    "torch",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "deepspeed",
    "sepdist.training.loop",
    "tests.support.runs",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest tests first, so that no process works alone at the end of the suite."""

    def seconds(item: pytest.Item) -> float:
        mark = item.get_closest_marker("seconds")
        return mark.args[0] if mark else 0.0

    items.sort(key=seconds, reverse=True)  # stable: all others stay in their order


def pytest_collection_finish() -> None:
    """Let `forkserver` processes fork from one whose imports are done.

    Here, after the test modules are imported, because the first process to start settles it.
    """
    multiprocessing.set_forkserver_preload([*_TRAINING, "pytest", "hydra"])


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    for attempt in (1, 2):  # a port may be taken between its choice and its use
        server = S3Server(tmp_path_factory.mktemp("s3", numbered=True))
        try:
            server.start()
            break
        except (RuntimeError, TimeoutError):
            if attempt == 2:
                raise
    yield server
    server.kill()


@pytest.fixture
def s3_env(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, and the environment in which boto3, s3fs, Ray and TensorBoard find it."""
    for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "S3_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def bucket(s3_env: S3Server) -> Iterator[str]:
    """The name of a bucket that is empty before the test and gone after it."""
    client, name = s3_env.client(), f"test-{next(_NUMBERS)}"
    client.create_bucket(Bucket=name)
    yield name
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
        keys = [{"Key": one["Key"]} for one in page.get("Contents", [])]
        if keys:
            client.delete_objects(Bucket=name, Delete={"Objects": keys})
    for upload in client.list_multipart_uploads(Bucket=name).get("Uploads", []):
        client.abort_multipart_upload(Bucket=name, Key=upload["Key"], UploadId=upload["UploadId"])
    client.delete_bucket(Bucket=name)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, where the tests may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Data sets of generated speech: 10 mixtures to train on and 4 others, by split."""
    folder = tmp_path_factory.mktemp("data")
    corpus = {
        "_target_": "sepdist.corpora.demo.DemoCorpus",
        "num_train": 10,
        "num_dev": 4,
        "num_test": 4,
    }
    places = {}
    for split in ("train", "dev"):
        places[split] = str(folder / split)
        write_data_set(
            ShardConfig(corpus=corpus, split=split, output=places[split], samples_per_shard=4)
        )
    return places
