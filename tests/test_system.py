"""The whole system as a user runs it: programs, shards and runs in real object storage, Ray."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile
import yaml

from sepdist import cli, storage
from sepdist.inference.export import load_export
from sepdist.reporting import read_metrics
from sepdist.training.audit import audit
from sepdist.training.checkpoint import find_committed, load_newest
from tests.support.runs import (
    ROOT,
    TINY,
    final_hash,
    frozen,
    history,
    loop,
    program,
    train_arguments,
)

FRESH = ["init.weights=null", "init.reinit=[]"]


def upload(folder: str, url: str) -> str:
    for path in sorted(Path(folder).rglob("*"), key=lambda p: (p.name == "manifest.json", str(p))):
        if path.is_file():
            storage.put_file(path, storage.join(url, str(path.relative_to(folder))))
    return url


def test_a_run_cut_in_an_epoch_and_started_again_ends_with_the_same_bits(
    tiny_data, tmp_path
) -> None:
    """10 mixtures, 4 per step: epochs end inside steps. The second run stops after step 3 of 7."""
    every = ["validation.every_steps=2", "training.checkpoint_every=1"]
    loop(frozen(tiny_data, tmp_path / "whole", "training.max_steps=7", *every))
    loop(frozen(tiny_data, tmp_path / "cut", "training.max_steps=3", *every))
    loop(frozen(tiny_data, tmp_path / "cut", "training.max_steps=7", *every))
    whole, cut = history(tmp_path / "whole"), history(tmp_path / "cut")
    assert list(whole) == list(cut) == list(range(1, 8))
    assert whole == cut
    assert final_hash(tmp_path / "whole") == final_hash(tmp_path / "cut")
    assert audit(str(tmp_path / "cut")).sound
    switching = [row for row in read_metrics(str(tmp_path / "whole")) if "switching/rate" in row]
    assert [row["switching/epoch"] for row in switching] == [1.0]
    state = load_newest(str(tmp_path / "whole")).state
    assert state["samples_seen"] == 28 and state["world_size"] == 1


@pytest.mark.seconds(90)
def test_the_whole_road_on_object_storage_ends_with_the_bits_of_one_process_on_disk(
    tiny_data, bucket, tmp_path
) -> None:
    """Shards in s3:// -> SE -> hand-off -> PIT -> evaluate -> separate, run_dirs in s3:// too.

    PIT runs in two Ray workers at ZeRO 1 and is compared with a single process without Ray.
    """
    steps = ["training.max_steps=3", "validation.every_steps=2", "validation.num_listening=1"]
    once = ["training.max_steps=3", "validation.every_steps=3"]
    loop(frozen(tiny_data, tmp_path / "se", *once, experiment="demo/pretrain"))
    data = {
        split: upload(folder, f"s3://{bucket}/data/{split}") for split, folder in tiny_data.items()
    }
    pretrained = upload(str(tmp_path / "se"), f"s3://{bucket}/runs/se")
    finetuned, cache = f"s3://{bucket}/runs/pit", tmp_path / "cache"
    workers = ["cluster.num_workers=2", "engine.zero_stage=1"]
    arguments = train_arguments("demo/finetune", data, finetuned, *steps, *workers)
    arguments += [f"init.weights={pretrained}", f"data.cache_dir={cache}"]
    output = program(*arguments).replace("\n", "")
    assert "re-initialised: mask_conv.bias, mask_conv.weight" in output
    check_run_in_object_storage(finetuned)

    hand_off = [f"init.weights={tmp_path / 'se'}", "init.reinit=[mask_conv]"]
    loop(frozen(tiny_data, tmp_path / "alone", *steps, *hand_off))
    assert history(finetuned) == history(tmp_path / "alone")
    assert final_hash(finetuned) == final_hash(tmp_path / "alone")

    place = f"s3://{bucket}/evaluation"
    scored = [f"model={finetuned}", f"data={data['dev']}", f"output={place}", "num_workers=0"]
    program("-m", "sepdist", "evaluate", *scored, f"cache_dir={cache}")
    results = json.loads(storage.read_bytes(f"{place}/results.json"))
    assert "si_snri" in json.dumps(results) and "sdri" in json.dumps(results)

    recording, separated = tmp_path / "two.wav", tmp_path / "out"
    soundfile.write(recording, two_tones(9001, 11025), 11025)
    separate = ["separate", "--model", finetuned, "--output", str(separated), str(recording)]
    program("-m", "sepdist", *separate)
    for speaker in ("s1", "s2"):
        wave, rate = soundfile.read(separated / f"two_{speaker}.wav")
        assert rate == 11025 and len(wave) == 9001 and np.isfinite(wave).all()


def two_tones(num_samples: int, rate: int) -> np.ndarray:
    phase = 2 * np.pi * np.arange(num_samples) / rate
    return 0.3 * np.sin(200 * phase) + 0.3 * np.sin(330 * phase)


def check_run_in_object_storage(url: str) -> None:
    """The files, lineage, metrics and audit of the road's PIT run."""
    assert storage.exists(f"{url}/config.yaml") and storage.exists(f"{url}/metrics.jsonl")
    lineage = load_export(url).lineage
    events = storage.list_names(f"{url}/tensorboard/{lineage['run']}")
    assert any("tfevents" in name for name in events)
    assert lineage["reinitialised"] == ["mask_conv.bias", "mask_conv.weight"]
    assert lineage["parent"]["run"] == "demo-pretrain" and lineage["parent"]["step"] == 3
    rows = read_metrics(url)
    names = {"loss/total", "train/si_snri", "optim/lr", "optim/grad_norm"}
    names |= {f"speed/{name}" for name in ("data_wait_share", "checkpoint_share")}
    assert names | {"speed/audio_seconds_per_second"} <= rows[0].keys()
    assert "validation/si_snri" in {name for row in rows for name in row}
    audited = audit(url)
    assert audited.sound and audited.positions == 12 and audited.world_sizes == {2: 3}


def test_a_run_dir_refuses_another_config_and_stays_whole(tiny_data, tmp_path, sepdist) -> None:
    loop(frozen(tiny_data, tmp_path / "run", "training.max_steps=1"))
    before = final_hash(tmp_path / "run")
    arguments = train_arguments("demo/finetune", tiny_data, tmp_path / "run", *FRESH)
    refusal = sepdist(*arguments[2:], "training.max_steps=1", "optim.lr=0.5", expect=1)
    assert "optim.lr was 0.002, is 0.5" in refusal.replace("\n", " ")
    assert final_hash(tmp_path / "run") == before


@pytest.fixture
def sepdist(monkeypatch, capsys) -> Callable[..., str]:
    """Run `sepdist arguments...` in this process, check its exit status and return its output."""

    def run(*arguments: str, expect: int) -> str:
        monkeypatch.setattr("sys.argv", ["sepdist", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert ended.value.code == expect, out + err
        assert "Traceback" not in out + err
        return out + err

    return run


def test_a_program_in_its_own_process_ends_with_status_1_and_one_line(tiny_data, tmp_path) -> None:
    data = tiny_data | {"train": "/nosuch/folder"}
    output = program(*train_arguments("demo/finetune", data, tmp_path / "run", *FRESH), expect=1)
    assert "/nosuch/folder" in output.replace("\n", "") and "Traceback" not in output


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("data.train=/nosuch/folder", "/nosuch/folder"),
        ("data.train=s3://nosuch-bucket/x", "nosuch-bucket"),
        ("model._target_=os.system", "os.system"),
        ("training.stepz=3", "stepz"),
        ("init.weights=/nosuch/run", "/nosuch/run"),
        ("sample_rate=16000", "8000 Hz"),
        ("cluster.num_workers=9", "num_virtual_shards"),
        ("experiment=demo/nosuch", "demo/nosuch"),
        ("engine.zero_stage=3", "reduction=native"),
        ("objective=masked", "model.masking=false"),
    ],
)
def test_what_cannot_work_is_refused_before_any_worker_starts(
    override, named, tiny_data, tmp_path, s3_env, sepdist
) -> None:
    arguments = train_arguments("demo/finetune", tiny_data, tmp_path / "run", *FRESH)[2:]
    if override.startswith("experiment="):
        arguments.remove("experiment=demo/finetune")
    output = sepdist(*arguments, override, expect=1)
    assert named in output.replace("\n", ""), output
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_weights_of_another_model_are_refused_with_the_way_out(
    tiny_data, tmp_path, sepdist
) -> None:
    loop(frozen(tiny_data, tmp_path / "first", "training.max_steps=1"))
    arguments = train_arguments("demo/pretrain", tiny_data, tmp_path / "second")[2:]
    output = sepdist(*arguments, f"init.weights={tmp_path / 'first'}", expect=1).replace("\n", " ")
    assert "mask_conv.bias" in output and "init.reinit=['mask_conv']" in output


@pytest.mark.seconds(40)
def test_a_damaged_shard_stops_training_by_name(tiny_data, tmp_path) -> None:
    data = {"train": str(tmp_path / "train"), "dev": tiny_data["dev"]}
    shutil.copytree(tiny_data["train"], data["train"])
    victim = sorted(Path(data["train"]).glob("*.tar"))[1]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 4
    victim.write_bytes(content)
    arguments = train_arguments("demo/finetune", data, tmp_path / "run", *FRESH)
    arguments += ["training.max_steps=3", "cluster.max_failures=0", "cluster.num_workers=1"]
    output = program(*arguments, expect=1)
    assert victim.name in output.replace("\n", "") and ": damaged, " in output.replace("\n", " ")


PTFT = [
    *TINY,
    "validation.every_steps=20",
    "training.checkpoint_every=20",
    "training.keep_every=20",
]
STAGES = {
    "se": {"experiment": "demo/pretrain", "overrides": ["training.max_steps=2"]},
    "ptft": {"experiment": "demo/finetune", "uses": ["se"], "overrides": ["training.max_steps=60"]},
    "ptft_test": {"kind": "evaluate", "uses": ["ptft"]},
    "figure": {"kind": "figure", "uses": ["se", "ptft"]},
    "labels": {"kind": "labels", "uses": ["ptft"]},
}


def pipeline_arguments(data: dict[str, str], output: object, folder: Path) -> list[str]:
    """SE, PIT from it and all its results, two workers everywhere, as an experiment in `folder`."""
    cache = folder / "cache"
    places = [
        f"data.train={data['train']}",
        f"data.validation={data['dev']}",
        f"data.cache_dir={cache}",
    ]
    scored = ["num_workers=2", f"cache_dir={cache}"]
    train = [*places, *PTFT, "cluster.num_workers=2", "engine.zero_stage=1"]
    cells = ["ptft_test:metrics_db.si_snri.mean", "ptft:steps"]
    row = {"title": "PT-FT", "cells": cells, "paper": [14.1, None]}
    experiment = {
        "name": "tiny",
        "stages": STAGES,
        "overrides": {"train": train, "evaluate": scored, "labels": scored},
        "tables": [{"columns": ["SI-SNRi", "steps"], "rows": [row]}],
    }
    (folder / "experiment").mkdir()
    (folder / "experiment" / "tiny.yaml").write_text(
        "# @package _global_\n" + yaml.safe_dump(experiment, sort_keys=False)
    )
    program = ["-m", "sepdist", "pipeline", "--config-dir", str(folder), "experiment=tiny"]
    return [*program, f"output={output}", f"test_data={data['dev']}"]


def check_pipeline(output: str) -> None:
    """Every stage has finished, and the table holds what the evaluation found."""
    seed = f"{output}/seed-0"
    assert all(storage.exists(f"{seed}/{name}/stage.json") for name in STAGES)
    assert storage.read_bytes(f"{seed}/figure/figure.png").startswith(b"\x89PNG")
    results = json.loads(storage.read_bytes(f"{seed}/ptft_test/results.json"))
    [table] = json.loads(storage.read_bytes(f"{output}/table.json"))["tables"]
    [row] = table["rows"]
    si_snri, steps = (cell["seeds"]["0"] for cell in row["cells"])
    assert si_snri == results["metrics_db"]["si_snri"]["mean"] and steps == 60
    assert load_export(f"{seed}/ptft").lineage["parent"]["run"] == "tiny-se-0"
    rates = json.loads(storage.read_bytes(f"{seed}/labels/switching.json"))["rates"]
    assert [(one["from"], one["to"]) for one in rates] == [(20, 40), (40, 60)]


@pytest.mark.slow
def test_a_pipeline_in_object_storage_is_stopped_goes_on_and_ends_with_the_bits_of_one_process(
    tiny_data, bucket, tmp_path
) -> None:
    data = {
        split: upload(folder, f"s3://{bucket}/data/{split}") for split, folder in tiny_data.items()
    }
    output = f"s3://{bucket}/tiny"
    arguments = pipeline_arguments(data, output, tmp_path)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "first.log", "wb") as log:
        first = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=env, stdout=log, stderr=log
        )
    try:
        until = time.monotonic() + 900
        while not find_committed(f"{output}/seed-0/ptft/checkpoints"):
            assert first.poll() is None and time.monotonic() < until, (
                tmp_path / "first.log"
            ).read_text()
            time.sleep(0.2)
        first.send_signal(signal.SIGINT)
        assert first.wait(120) == 130, (tmp_path / "first.log").read_text()
    finally:
        for process in (
            psutil.Process(first.pid).children(recursive=True) if first.poll() is None else []
        ):
            with_suppressed_kill(process)
        first.kill()
    assert "the same command goes on" in (tmp_path / "first.log").read_text()
    assert not storage.exists(f"{output}/seed-0/ptft/stage.json")
    reached = find_committed(f"{output}/seed-0/ptft/checkpoints")[-1].step
    assert 20 <= reached < 60

    assert program(*arguments, timeout=900).count("has finished before") == 1
    check_pipeline(output)
    losses = history(f"{output}/seed-0/ptft")
    assert list(losses) == list(range(1, 61))
    hand_off = [
        f"init.weights={output}/seed-0/se",
        "init.reinit=[mask_conv]",
        "training.max_steps=60",
    ]
    hand_off.append("engine.zero_stage=1")
    loop(frozen(tiny_data, tmp_path / "alone", *hand_off, settings=PTFT))
    assert history(tmp_path / "alone") == losses
    assert final_hash(tmp_path / "alone") == final_hash(f"{output}/seed-0/ptft")
    assert program(*arguments).count("has finished before") == 4  # all but the figure


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def ray_head(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray head with a job server that asks for a token: its address, the client's environment."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # socket paths must be short
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    dashboard = _free_port()
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_TMPDIR": folder,
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT),
    }
    env = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}
    ray = shutil.which("ray", path=str(Path(sys.executable).parent)) or "ray"
    command = [
        ray,
        "start",
        "--head",
        "--block",
        f"--port={_free_port()}",
        f"--dashboard-port={dashboard}",
    ]
    command += [
        "--dashboard-host=127.0.0.1",
        "--num-cpus=4",
        f"--temp-dir={folder}",
        "--object-store-memory=100000000",
    ]
    # The agent that accepts jobs has a fixed port unless one is chosen.
    command += [f"--dashboard-agent-listen-port={_free_port()}"]
    with open(tmp_path / "head.log", "wb") as log:
        head = subprocess.Popen(command, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        _wait_for(f"http://127.0.0.1:{dashboard}", head, tmp_path / "head.log")
        yield f"http://127.0.0.1:{dashboard}", environment
    finally:
        family = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
        for process in family:
            with_suppressed_kill(process)
        head.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def with_suppressed_kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(240):
        assert process.poll() is None, log.read_text()
        try:
            opener.open(url, timeout=2).close()
            return
        except urllib.error.HTTPError:
            return  # it answers, and asks for the token
        except OSError:
            time.sleep(0.25)
    raise AssertionError(log.read_text())


def submit(ray_head: tuple[str, dict[str, str]], entry_point: list[str]) -> None:
    """Run a command as a job of that cluster, to its end."""
    address, environment = ray_head
    ray = shutil.which("ray", path=str(Path(sys.executable).parent)) or "ray"
    command = [
        ray,
        "job",
        "submit",
        "--address",
        address,
        "--working-dir",
        ".",
        "--",
        *entry_point,
    ]
    env = {**os.environ, **environment}
    done = subprocess.run(
        command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert "succeeded" in done.stdout


@pytest.mark.seconds(45)
def test_ray_job_submit_trains_on_a_cluster_with_token_authentication(
    ray_head, tiny_data, tmp_path
) -> None:
    run_dir = tmp_path / "run"
    sepdist = shutil.which("sepdist", path=str(Path(sys.executable).parent))
    assert sepdist, "the environment of the tests has no sepdist command: make install"
    arguments = train_arguments("demo/finetune", tiny_data, run_dir, *FRESH)[2:]
    submit(ray_head, [sepdist, *arguments, "training.max_steps=2", "cluster.num_workers=2"])
    assert sorted(history(run_dir)) == [1, 2]
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["cluster"]["num_workers"] == 2


@pytest.mark.slow
def test_ray_job_submit_runs_a_pipeline(ray_head, tiny_data, tmp_path) -> None:
    arguments = pipeline_arguments(tiny_data, tmp_path / "tiny", tmp_path)
    submit(ray_head, [sys.executable, *arguments])
    check_pipeline(str(tmp_path / "tiny"))
