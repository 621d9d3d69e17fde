"""sepdist shard: what it writes, that it resumes to the same bytes, and its errors."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import psutil
import pytest
import soundfile

from sepdist import storage
from sepdist.corpora.demo import DemoCorpus
from sepdist.data import shards
from tools import shard_data

ROOT = Path(__file__).parents[2]
SMALL = ["corpus=demo", "split=dev", "corpus.num_dev=5", "samples_per_shard=2"]
LONGER = ["corpus=demo", "split=train", "corpus.num_train=36", "samples_per_shard=3"]


def shard(arguments: list[str]) -> int:
    """Run the program in this process; returns its exit status."""
    with patch.object(sys, "argv", ["shard_data.py", *arguments]):
        try:
            return shard_data.main() or 0
        except SystemExit as exit_:
            return int(exit_.code or 0)


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def start(arguments: list[str]) -> "subprocess.Popen[str]":
    command = [sys.executable, "tools/shard_data.py", *arguments]
    environment = {"PYTHONPATH": ".", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    environment["HOME"] = str(Path.home())
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=-1, stderr=-1, text=True)


def stop_after_the_first_shard(
    process: "subprocess.Popen[str]", output: Path, signal_number: int
) -> tuple[int, str]:
    deadline = time.monotonic() + 60
    while not list(output.glob("*.tar")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal_number)
    error = process.communicate(timeout=60)[1]
    return process.returncode, error


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("small") / "dev"
    assert shard(["write", *SMALL, f"output={output}"]) == 0
    return output


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("longer") / "train"
    assert shard(["write", *LONGER, f"output={output}"]) == 0
    return output


def test_every_record_is_in_the_shards_in_the_order_of_the_corpus(small: Path) -> None:
    manifest = shards.read_manifest(str(small))
    assert [shard.num_samples for shard in manifest.shards] == [2, 2, 1]
    assert (manifest.corpus, manifest.split, manifest.sample_rate) == ("demo", "dev", 8000)
    samples = [
        (shard, sample)
        for shard in manifest.shards
        for sample in shards.read_index(str(small), shard)
    ]
    records = list(DemoCorpus(num_dev=5).records("dev"))
    for (shard, sample), record in zip(samples, records, strict=True):
        assert sample.key == record.id and sample.speakers == record.speakers
        with open(small / shard.name, "rb") as tar:
            found = shards.read_sample(tar, sample, ["s1", "s2", "noise"])
        for name, wave in record.load().items():
            np.testing.assert_allclose(found[name], wave, atol=0.5001 / 32768)


def test_info_and_verify_describe_a_sound_data_set(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shard(["verify", f"output={small}"]) == 0
    assert "intact: 3 shards, 5 samples" in capsys.readouterr().out
    assert shard(["info", f"output={small}"]) == 0
    shown = capsys.readouterr().out
    digest = shards.read_manifest(str(small)).digest()
    assert all(text in shown for text in ("demo, dev", "8000 Hz", digest))


def test_verify_fails_and_names_the_shard_when_a_byte_is_wrong(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    damaged = tmp_path / "demo-dev-000001.tar"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    assert shard(["verify", f"output={tmp_path}"]) == 1
    assert "demo-dev-000001" in capsys.readouterr().out


def test_writing_a_finished_data_set_again_changes_nothing(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(small)
    assert shard(["write", *SMALL, f"output={small}"]) == 0
    assert contents(small) == before


@pytest.mark.parametrize(
    "change", ["corpus.seed=1", "samples_per_shard=3", "split=test", "limit=2"]
)
def test_shards_of_other_settings_are_not_mixed_in(
    small: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    before = contents(small)
    assert shard(["write", *SMALL, change, f"output={small}"]) == 1
    assert f"{change.split('=')[0]} was" in capsys.readouterr().err
    assert contents(small) == before


def test_a_source_yaml_with_the_old_key_part_is_read_as_subset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["write", *SMALL, f"output={tmp_path}"]
    assert shard([*command, "subset=[0.0,0.5]"]) == 0
    source = tmp_path / "source.yaml"
    text = source.read_text()
    source.write_text(text.replace("subset:", "part:"))
    assert "subset:" in text and shard([*command, "subset=[0.0,0.5]"]) == 0
    assert shard([*command, "subset=[0.5,1.0]"]) == 1
    assert "subset was [0.0, 0.5], is [0.5, 1.0]" in capsys.readouterr().err


def test_killed_and_started_again_it_makes_the_same_bytes(longer: Path, tmp_path: Path) -> None:
    output = tmp_path / "train"
    command = ["write", *LONGER, f"output={output}"]
    stop_after_the_first_shard(start(command), output, signal.SIGKILL)
    assert not (output / "manifest.json").exists()
    assert shard(command) == 0
    assert contents(output) == contents(longer)


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "train"
    status, error = stop_after_the_first_shard(
        start(["write", *LONGER, f"output={output}"]), output, signal.SIGINT
    )
    assert status == 130
    assert "The same command continues" in error and "Traceback" not in error
    assert not (output / "manifest.json").exists()


@pytest.mark.xdist_group("ray")
def test_ray_workers_one_of_them_killed_write_the_same_bytes_as_one_process(
    longer: Path, tmp_path: Path
) -> None:
    output = tmp_path / "train"
    process = start(["write", *LONGER, f"output={output}", "num_workers=-1"])
    deadline = time.monotonic() + 120
    workers: list[psutil.Process] = []
    while not (workers and list(output.glob("*.tar"))):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)  # Ray lowers its workers' priority, so polling must leave them time
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in children if "ray::write_job" in title(child)]
    workers[0].kill()
    shown, error = process.communicate(timeout=180)
    assert process.returncode == 0, error
    assert "shards per minute" in shown
    assert contents(output) == contents(longer)


def title(process: psutil.Process) -> str:
    """The command line, empty if the process is gone."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def test_a_data_set_in_object_storage_has_the_bytes_of_one_on_disk(
    small: Path, bucket: str
) -> None:
    url = f"s3://{bucket}/sets/dev"
    assert shard(["write", *SMALL, f"output={url}"]) == 0
    assert shard(["verify", f"output={url}"]) == 0
    for name in contents(small):
        assert storage.read_bytes(storage.join(url, name)) == (small / name).read_bytes()


def test_source_yaml_says_what_made_the_shards(small: Path) -> None:
    text = (small / "source.yaml").read_text()
    assert "DemoCorpus" in text and "num_dev: 5" in text and "split: dev" in text
    assert json.loads((small / "manifest.json").read_text())["num_samples"] == 5


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["write", "corpus=demo", "split=dev"], "output"),
        (["write", "corpus=demo", "output=OUT"], "no value given for split"),
        (["write", "split=dev", "output=OUT"], "no value given for corpus"),
        (["write", "corpus=demo", "split=a/b", "output=OUT"], "no slash"),
        (["write", "corpus=demo", "split=dev", "output=OUT", "num_worker=2"], "num_worker"),
        (["write", "corpus=nosuch", "split=dev", "output=OUT"], "nosuch"),
        (["write", "corpus=demo", "split=nosuch", "output=OUT"], "train, dev, test"),
        (["write", "corpus=demo", "split=dev", "output=OUT", "corpus.typo=1"], "typo"),
        (
            ["write", "corpus=demo", "split=dev", "output=OUT", "samples_per_shard=0"],
            "samples_per_shard",
        ),
        (["write", "corpus=demo", "split=dev", "output=OUT", "corpus.num_dev=0"], "no records"),
        (["write", "--jobs", "2"], "--jobs"),
        (["info", "output=OUT"], "manifest"),
        (["verify", "output=OUT"], "manifest"),
    ],
)
def test_an_error_is_one_line_that_names_the_thing_at_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    output = tmp_path / "out"
    assert shard([word.replace("OUT", str(output)) for word in arguments]) == 1
    shown = capsys.readouterr()
    assert expected in shown.err and shown.err.startswith("error: ")
    assert len(shown.err.splitlines()) == 1
    assert not list(tmp_path.rglob("*.tar"))


def test_bad_recordings_are_one_line_each_and_skip_counts_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "speech" / "train" / "anna" / "1"
    folder.mkdir(parents=True)
    for number in range(2):
        wave = np.random.default_rng(number).uniform(-0.1, 0.1, 2400)  # 0.3 s
        soundfile.write(folder / f"good-{number}.wav", wave, 8000)
        (folder / f"bad-{number}.wav").write_text("no audio")
    output = tmp_path / "out"
    command = ["write", "corpus=librispeech", f"corpus.root={tmp_path / 'speech'}", "split=train"]
    command.append(f"output={output}")
    assert shard(command) == 1
    title, *lines = capsys.readouterr().err.splitlines()
    assert title.startswith("error: 2 records cannot be stored") and "on_error=skip" in title
    assert [f"bad-{i}.wav" in line for i, line in enumerate(lines)] == [True, True]
    assert shard([*command, "on_error=skip"]) == 0
    written = capsys.readouterr().out
    assert "shorter than 0.4 s" in written and "2 (dynamic mixing needs" in written
    assert shard(["info", f"output={output}"]) == 0
    for shown in (written, capsys.readouterr().out):
        assert "records left out" in shown and "2 (listed in skipped.jsonl)" in shown


@pytest.mark.parametrize("words", [[], ["shred"]])
def test_without_one_of_its_actions_it_explains_them(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert shard(words) == 2
    shown = capsys.readouterr().err
    assert "usage: sepdist shard write|verify|info KEY=VALUE ...\n" in shown
    assert ("error: no action 'shred': give write, verify or info\n" in shown) == bool(words)
    assert "`write` puts shards" in shown


def test_help_lists_the_verbs_the_keys_and_the_corpora(capsys: pytest.CaptureFixture[str]) -> None:
    assert shard(["--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: sepdist shard write|verify|info KEY=VALUE ...\n")
    for word in ("write", "verify", "info", "samples_per_shard", "num_workers", "demo"):
        assert word in shown
