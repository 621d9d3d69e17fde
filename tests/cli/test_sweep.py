"""Sweeps: a run_dir for each run, the best value, and nothing left behind by Hydra."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from sepdist.cli import train
from sepdist.cli.sweep import folder_name
from sepdist.config import TrainConfig
from sepdist.console import user_console
from tests.support.runs import ROOT, loop, program, train_arguments

GIVEN = ["experiment=demo/finetune", "data.train=a b=c", "run_dir=out, (1)"]


@pytest.fixture
def swept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., list]]:
    """Run `sepdist train` with training replaced: a score that peaks at the rate 0.3."""

    def swept(*words: str) -> list[TrainConfig]:
        runs: list[TrainConfig] = []

        def score(cfg: TrainConfig) -> float | None:
            runs.append(cfg)
            return None if cfg.seed == 9 else 10 - abs(cfg.optim["lr"] - 0.3)

        monkeypatch.setattr(train, "train", score)
        monkeypatch.setattr(sys, "argv", ["sepdist train", *words])
        with pytest.raises(SystemExit) as exit_:
            train.main()
        assert exit_.value.code == 0 and list(tmp_path.iterdir()) == []
        return runs

    monkeypatch.chdir(tmp_path)
    yield swept


@pytest.mark.parametrize("asked", ["-m", "--multirun", "hydra.mode=MULTIRUN"])
def test_each_run_has_the_folder_of_its_values_and_the_best_is_marked(
    swept, asked: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = swept(asked, "optim.lr=5", "run_dir=x", *GIVEN, "optim.lr=1e-3,0.2", "seed=0,9")
    names = ["0.001,seed=0", "0.001,seed=9", "0.2,seed=0", "0.2,seed=9"]
    assert [one.run_dir for one in runs] == [f"out, (1)/optim.lr={name}" for name in names]
    assert [one.name for one in runs] == [f"demo-finetune,optim.lr={name}" for name in names]
    assert {one.data.train for one in runs} == {"a b=c"}
    assert [(one.optim["lr"], one.seed) for one in runs] == [
        (0.001, 0),
        (0.001, 9),
        (0.2, 0),
        (0.2, 9),
    ]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and [line for line in lines if "best" in line] == [lines[3]]
    assert re.fullmatch(
        r"optim.lr=0.2 seed=0 +9\.900 +out, \(1\)/optim.lr=0.2,seed=0 +<- best", lines[3]
    )
    assert re.search("seed=9 +- +out", lines[2])


def test_a_sweep_without_values_is_one_run_in_its_run_dir(swept) -> None:
    assert [one.run_dir for one in swept("-m", *GIVEN)] == ["out, (1)"]


def test_models_and_data_sets_can_be_swept_too(swept) -> None:
    runs = swept("-m", *GIVEN, "model=conv_tasnet,dprnn", "data.train=x/a,x_a")
    assert [one.data.train for one in runs] == ["x/a", "x_a"] * 2
    assert len({one.run_dir for one in runs}) == 4
    assert all("/" not in one.run_dir.removeprefix("out, (1)/") for one in runs)


@pytest.mark.parametrize(
    ("rates", "status"), [(["5.0", "0.2"], 0), (["0.2", "5.0"], 0), (["5.0", "6.0"], 1)]
)
def test_a_sweep_goes_on_after_a_run_that_diverged_and_fails_if_all_did(
    rates: list[str],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from sepdist.training.launch import TrainingFailedError

    def score(cfg: TrainConfig) -> float:
        with user_console(TrainingFailedError):
            if cfg.optim["lr"] > 1:
                raise TrainingFailedError("no validation had a finite score")
            return 7.0

    monkeypatch.setattr(train, "train", score)
    words = ["-m", *GIVEN, f"optim.lr={','.join(rates)}"]
    monkeypatch.setattr(sys, "argv", ["sepdist train", *words])
    with pytest.raises(SystemExit) as exit_:
        train.main()
    shown = capsys.readouterr()
    assert exit_.value.code == status
    assert set(shown.err.splitlines()) == {"error: no validation had a finite score"}
    rows = {line.split()[0]: line for line in shown.out.splitlines()[1:]}
    assert re.search(r"optim.lr=5.0 +- +out", rows["optim.lr=5.0"])
    assert shown.out.count("<- best") == 1 - status
    if "0.2" in rates:
        assert re.search(r"optim.lr=0.2 +7.000 .*<- best$", rows["optim.lr=0.2"])


@pytest.mark.parametrize("error", [ValueError("no data"), KeyboardInterrupt()])
def test_a_sweep_ends_at_a_mistake_or_ctrl_c(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []

    def score(cfg: TrainConfig) -> float:
        runs.append(cfg.run_dir)
        with user_console():
            raise error

    monkeypatch.setattr(train, "train", score)
    monkeypatch.setattr(sys, "argv", ["sepdist train", "-m", *GIVEN, "seed=0,1"])
    with pytest.raises(SystemExit) as exit_:
        train.main()
    assert exit_.value.code == (1 if isinstance(error, ValueError) else 130) and len(runs) == 1
    assert capsys.readouterr().err in ("error: no data\n", "stopped\n")


def test_the_name_of_a_folder_is_safe_short_and_its_own() -> None:
    assert folder_name(["optim.lr=1e-05", "+seed=1"]) == "optim.lr=1e-05,seed=1"
    odd = [folder_name([f"data.train={one}"]) for one in ("a/b", "a:b", "../../b", "ä" * 400)]
    assert len(set(odd)) == 4
    assert all(re.fullmatch(r"[\w.=,-]+", one) and len(one.encode()) < 200 for one in odd)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.rate=1,2", "optim.rate"),
        ("model=dprnn,nosuch", "nosuch.*sepformer"),
        ("training.max_steps=few", "few"),
        ("init.weights=${nosuch}", "nosuch"),
    ],
)
def test_a_sweep_that_does_not_compose_ends_in_one_line(
    word: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sepdist train", "-m", *GIVEN, "seed=0,1", word])
    with pytest.raises(SystemExit) as exit_:
        train.main()
    shown = capsys.readouterr().err
    assert exit_.value.code == 1 and shown.startswith("error: ") and shown.count("\n") == 1
    assert re.search(message, shown)


def test_optuna_searches_for_the_highest_score(
    swept, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    kept = tmp_path_factory.mktemp("kept")  # its own results, which are not kept unless asked for
    search = ["hydra.sweeper.n_trials=4", "hydra.sweeper.sampler.seed=1", f"hydra.sweep.dir={kept}"]
    words = ["hydra/sweeper=optuna", *search, "optim.lr=5", "optim.lr=interval(0.1,0.9)"]
    rates = [one.optim["lr"] for one in swept(*GIVEN, *words)]
    assert len(set(rates)) == 4 and all(0.1 <= rate <= 0.9 for rate in rates)
    results = yaml.safe_load((kept / "optimization_results.yaml").read_text())
    assert results["best_value"] == max(10 - abs(rate - 0.3) for rate in rates)
    [best] = [line for line in capsys.readouterr().out.splitlines() if "best" in line]
    assert best.startswith(f"optim.lr={results['best_params']['optim.lr']} ")


@pytest.mark.parametrize(
    "on_ray", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.xdist_group("ray")])]
)
def test_a_sweep_of_two_rates_ends_in_two_run_dirs_and_one_best_value(
    on_ray: bool,
    tiny_data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps = ["training.max_steps=2", "validation.every_steps=2", "validation.num_mixtures=1"]
    fresh = ["init.weights=null", "init.reinit=[]", "cluster.num_workers=1"]
    words = train_arguments("demo/finetune", tiny_data, tmp_path / "runs", *steps, *fresh)
    words += ["-m", "optim.lr=1e-3,1e-4"]
    before = {path.name for path in ROOT.iterdir()}
    if on_ray:
        shown = program(*words)
    else:
        from sepdist.training import launch

        monkeypatch.setattr(launch, "launch", lambda cfg, *_: loop(f"{cfg.run_dir}/config.yaml"))
        monkeypatch.setattr(sys, "argv", ["sepdist train", *words[3:]])
        with pytest.raises(SystemExit) as exit_:
            train.main()
        assert exit_.value.code == 0
        shown = capsys.readouterr().out
    folders = {path.name for path in (tmp_path / "runs").iterdir()}
    assert folders == {"optim.lr=0.001", "optim.lr=0.0001"}
    for folder in folders:
        assert list((tmp_path / "runs" / folder / "checkpoints").iterdir())
    table = shown.splitlines()[-3:]
    assert sum("<- best" in line for line in table) == 1
    scores = [float(line.split()[1]) for line in table[1:]]
    assert [("best" in line) for line in table[1:]] == [one == max(scores) for one in scores]
    assert {path.name for path in ROOT.iterdir()} == before
