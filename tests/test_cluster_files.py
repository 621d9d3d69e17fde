"""The files of cluster/, checked as far as possible without a cluster."""

import json
import os
import re
import shlex
import signal
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.runtime_env.packaging import _get_excludes, get_excludes_from_ignore_files
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

from sepdist import composing, config
from sepdist.training import meter
from tests.support.runs import started

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RAY_LAUNCHER = ["aws-gpu.yaml", "local.yaml"]
KUBERAY = ["kuberay/raycluster.yaml", "kuberay/rayjob.yaml"]


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def composes(words: list[str]) -> config.TrainConfig:
    """The config that `sepdist train WORDS` would run."""
    return config.typed(composing.compose("train", words, config.TrainConfig), config.TrainConfig)


def cluster_spec(name: str) -> dict[str, Any]:
    spec = read(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def containers(name: str) -> list[dict[str, Any]]:
    spec = cluster_spec(name)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


def test_the_folder_holds_the_files_that_these_tests_check() -> None:
    found = {str(path.relative_to(CLUSTER)) for path in CLUSTER.rglob("*") if path.is_file()}
    checked = {
        *RAY_LAUNCHER,
        *KUBERAY,
        "README.md",
        "Dockerfile",
        "runtime_env.yaml",
        "keep-ray.sh",
        "grafana/sepdist.json",
        "systemd/sepdist-ray.service",
        "slurm/train.sbatch",
    }
    assert found == checked


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """keep-ray.sh with a `ray` that runs the given lines of shell and writes down its calls."""
    command = ["bash", str(CLUSTER / "keep-ray.sh"), "--address=h:6379", "--num-cpus=2"]
    with started() as run:

        def start(*lines: str) -> subprocess.Popen[str]:
            ray = tmp_path / "bin" / "ray"
            ray.parent.mkdir()
            calls = shlex.quote(str(tmp_path / "calls"))
            ray.write_text("\n".join(["#!/bin/bash", f'echo "$@" >> {calls}', *lines, ""]))
            ray.chmod(0o755)
            changes = {"PATH": f"{ray.parent}:{os.environ['PATH']}", "KEEP_RAY_SECONDS": "0.05"}
            return run(*command, env=os.environ | changes, stderr=subprocess.PIPE)

        yield start


def calls_of_ray(folder: Path, count: int) -> list[str]:
    for _ in range(400):
        found = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
        if len(found) >= count:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{found}, not {count} calls")


@pytest.mark.parametrize("ending", ["exit 1", "exit 0", "kill -KILL $$"])
def test_ray_that_ended_on_a_host_is_started_again_and_again(kept, tmp_path, ending) -> None:
    process = kept(ending)
    assert set(calls_of_ray(tmp_path, 3)) == {"start --block --address=h:6379 --num-cpus=2"}
    assert process.poll() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_ray_and_ends_its_keeper_for_good(kept, tmp_path, number) -> None:
    drained = shlex.quote(str(tmp_path / "drained"))
    process = kept(
        f"trap 'sleep 0.3; echo yes > {drained}; exit 0' TERM", "while true; do sleep 0.05; done"
    )
    calls_of_ray(tmp_path, 1)
    time.sleep(0.2)  # until the trap of the stub is set
    process.send_signal(number)
    assert process.wait(20) == 0 and (tmp_path / "drained").read_text() == "yes\n"
    assert len(calls_of_ray(tmp_path, 1)) == 1


@pytest.mark.parametrize("name", RAY_LAUNCHER)
def test_ray_up_accepts_the_cluster_file(name: str) -> None:
    validate_config(prepare_config(read(name)))


@pytest.mark.parametrize("name", RAY_LAUNCHER)
def test_ray_up_clusters_ask_for_a_token_and_keep_the_dashboard_on_loopback(name: str) -> None:
    cluster = read(name)
    starts = [line for kind in ("head", "worker") for line in cluster[f"{kind}_start_ray_commands"]]
    starts = [line for line in starts if "ray start" in line]
    starts += [line for line in cluster["worker_start_ray_commands"] if "keep-ray.sh --a" in line]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]
    assert "~/.ray/auth_token" in cluster["file_mounts"]


@pytest.mark.parametrize("name", RAY_LAUNCHER)
def test_ray_up_keeps_ray_running_on_workers_and_ends_the_keeper_before_another(name: str) -> None:
    cluster = read(name)
    *before, start = cluster["worker_start_ray_commands"]
    assert re.search(r"setsid nohup bash ~/sepdist/(cluster/keep-ray\.sh) .* &", start)
    pattern = shlex.split(before[0])[3]
    assert before[0].startswith("pkill -TERM -f ") and before[1].endswith("ray stop")
    assert re.search(pattern, start) and not re.search(pattern, before[0])  # else it ends itself


def test_systemd_starts_ray_again_whenever_it_ends_and_drains_it_when_told_to_stop() -> None:
    text = (CLUSTER / "systemd" / "sepdist-ray.service").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    unit = dict(line.split("=", 1) for line in lines if "=" in line)
    assert unit["Restart"] == "always" and unit["StartLimitIntervalSec"] == "0"
    assert " ray start --block " in unit["ExecStart"].replace("bin/ray", "bin/ ray")
    assert unit["KillMode"] == "mixed" and int(unit["TimeoutStopSec"]) > 30
    assert "RAY_AUTH_MODE=token" in unit["Environment"]


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_start_again_and_the_options_in_comments_are_fields_in_their_places(name) -> None:
    """Every comment that looks like a field is put in, and the file still reads."""
    text = (CLUSTER / name).read_text()
    on = re.sub(r"(?m)^( +)# (serviceAccountName|nodeSelector|tolerations|  - )", r"\1\2", text)
    spec = yaml.safe_load(on)["spec"]
    spec = spec.get("rayClusterSpec", spec)
    assert spec["headGroupSpec"]["template"]["spec"]["serviceAccountName"] == "sepdist"
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        assert pod["serviceAccountName"] == "sepdist" and pod["restartPolicy"] == "Always"
        assert {one["key"] for one in pod["tolerations"]} >= {"nvidia.com/gpu"}
        assert all(set(one) == {"key", "operator", "effect"} for one in pod["tolerations"])
        assert list(pod["nodeSelector"].values()) == ["true"]


def exported() -> set[str]:
    """What Ray calls the metrics that the loop logs; those of objectives and models are more."""
    source = "".join(
        (ROOT / "sepdist" / "training" / n).read_text() for n in ("meter.py", "loop.py")
    )
    literal = set(re.findall(r'"((?:loss|optim|speed|data|goodput)/[a-z_]+)"', source))
    literal |= {f"goodput/{kind}_seconds" for kind in meter.KINDS}
    literal |= {f"{group}/si_snri" for group in ("train", "validation")}
    return {"ray_sepdist_" + name.replace("/", "_") for name in literal} | {RESTARTS}


RESTARTS = "ray_sepdist_restarts_total"  # Prometheus' name for a counter


def named(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


def test_the_grafana_dashboard_shows_only_metrics_that_are_exported() -> None:
    text = (CLUSTER / "grafana" / "sepdist.json").read_text()
    dashboard = json.loads(text)
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert named("".join(shown)) <= exported() and named(text) <= exported()
    wanted = ("loss_total", "validation_si_snri", "speed_audio_seconds_per_second")
    wanted += ("goodput_share", "restarts_total")
    assert {f"ray_sepdist_{name}" for name in wanted} <= named("".join(shown))
    assert all('run=~"$run"' in expression for expression in shown)
    variables = {one["name"] for one in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", text)) - {"__all"} <= variables


def test_the_panels_of_the_dashboard_lie_side_by_side_and_ask_the_chosen_prometheus() -> None:
    panels = json.loads((CLUSTER / "grafana" / "sepdist.json").read_text())["panels"]
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert {panel["datasource"] for panel in panels} == {"${datasource}"}
    assert len({panel["id"] for panel in panels}) == len(panels)


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_files_run_the_ray_version_of_the_project_with_token_authentication(
    name: str,
) -> None:
    document, spec = read(name), cluster_spec(name)
    assert document["apiVersion"] == "ray.io/v1" and document["kind"] in ("RayCluster", "RayJob")
    wanted = next(line for line in PROJECT["dependencies"] if line.startswith("ray["))
    lowest = re.search(r">=([\d.]+)", wanted)
    assert lowest is not None and spec["rayVersion"].startswith(lowest[1])
    assert spec["authOptions"] == {"mode": "token"}
    assert len({container["image"] for container in containers(name)}) == 1


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_request_what_they_are_limited_to_and_mount_what_they_declare(name: str) -> None:
    for container in containers(name):
        assert container["resources"]["requests"] == container["resources"]["limits"]
    for group in cluster_spec(name)["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        pod = group["template"]["spec"]
        mounted = {
            mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]
        }
        assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_entry_point_of_the_ray_job_is_a_command_that_composes_and_fits_its_workers() -> None:
    entry_point = read("kuberay/rayjob.yaml")["spec"]["entrypoint"]
    command, words = entry_point.split(" train ")
    assert command in ("python -m sepdist", "sepdist")
    words = shlex.split(words)
    cfg = composes(words)
    assert cfg.run_dir.startswith("s3://") and cfg.data.train.startswith("s3://")
    group = cluster_spec("kuberay/rayjob.yaml")["workerGroupSpecs"][0]
    offered = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert cfg.cluster.use_gpu and cfg.cluster.num_workers <= group["maxReplicas"] * int(
        offered["nvidia.com/gpu"]
    )
    assert cfg.cluster.cpus_per_worker <= int(offered["cpu"])


@pytest.mark.parametrize("text", [(CLUSTER / "runtime_env.yaml").read_text(), "rayjob"])
def test_runtime_environments_are_valid_and_carry_no_credential(text: str) -> None:
    if text == "rayjob":
        text = read("kuberay/rayjob.yaml")["spec"]["runtimeEnvYAML"]
    environment = RuntimeEnv(**yaml.safe_load(text))
    assert not {"pip", "uv", "conda"} & set(environment)
    assert not re.search("SECRET|ACCESS_KEY|TOKEN", text)


def test_a_job_that_is_submitted_from_the_checkout_takes_all_code_and_configs_along() -> None:
    excluded = [_get_excludes(ROOT, read("runtime_env.yaml")["excludes"])]
    excluded += get_excludes_from_ignore_files(ROOT, include_gitignore=True)
    files = [
        p
        for folder in ("sepdist", "configs", "tools")
        for p in (ROOT / folder).rglob("*")
        if p.is_file()
    ]
    needed = [path for path in files if path.suffix in (".py", ".yaml")]
    assert len(needed) > 20
    assert [
        str(path.relative_to(ROOT))
        for path in needed
        if any(leaves_out(path) for leaves_out in excluded)
    ] == []
    assert any(leaves_out(ROOT / ".git" / "config") for leaves_out in excluded)


def test_the_slurm_script_is_valid_shell_and_its_training_command_composes() -> None:
    path = CLUSTER / "slurm" / "train.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    assert "--exclusive" in text and "--requeue" in text and "RAY_AUTH_MODE=token" in text
    assert composes(
        ["cluster=gpu", "cluster.num_workers=8", "experiment=demo/finetune"]
    ).cluster.use_gpu


def test_the_slurm_script_without_an_experiment_says_how_to_give_one() -> None:
    result = subprocess.run(
        ["bash", str(CLUSTER / "slurm" / "train.sbatch")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2 and "no experiment given" in result.stderr


def test_what_the_dockerfile_copies_exists() -> None:
    copies = re.findall(
        r"^COPY (?:--\S+ )*(.+)$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE
    )
    sources = [source for line in copies for source in line.split()[:-1]]
    assert "pyproject.toml" in sources and "sepdist" in sources
    assert [source for source in sources if not (ROOT / source).exists()] in ([], ["README.md"])


def test_the_commands_of_the_readme_name_files_that_exist() -> None:
    text = (CLUSTER / "README.md").read_text()
    named = set(re.findall(r"\bcluster/[\w./-]+\.(?:yaml|sbatch)|cluster/Dockerfile", text))
    assert len(named) >= 6
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
