"""A score that is not finite is never the best, stagnates the schedule and ends no run well."""

import json
import math
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from ray.train.v2._internal.execution.failure_handling import FailureDecision

from sepdist.inference.export import load_export
from sepdist.reporting import to_json
from sepdist.training import launch
from sepdist.training.checkpoint import Committed, best_of, find_committed, load_newest
from sepdist.training.schedule import Schedule
from tests.support.checkpoints import assert_equal, save, snapshot
from tests.support.runs import ROOT, frozen, loop, program, train_arguments

NOT_FINITE = [math.nan, math.inf, -math.inf]
DIVERGING = ("optim.lr=1e25", "schedule.warmup_steps=0", "training.max_steps=4")


def strict(text: str | bytes) -> Any:
    """Parse JSON as other languages do: NaN and Infinity are no numbers."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def schedule() -> Schedule:
    return Schedule(0.1, warmup_steps=0, factor=0.5, patience=1, min_lr=1e-9, early_stop_patience=3)


@pytest.mark.parametrize("wrong", NOT_FINITE)
def test_a_later_finite_score_is_better_than_one_that_is_not(wrong: float) -> None:
    plateau = schedule()
    assert [plateau.observe(score, 1) for score in (wrong, -50.0, wrong, -49.0)] == [
        False,
        True,
        False,
        True,
    ]
    assert plateau.best == -49.0


@pytest.mark.parametrize("wrong", NOT_FINITE)
def test_a_score_that_is_not_finite_counts_as_a_stagnant_validation(wrong: float) -> None:
    plateau = schedule()
    plateau.observe(1.0, 1)
    rates, stops = [], []
    for _ in range(3):
        plateau.observe(wrong, 1)
        rates.append(plateau.lr(0))
        stops.append(plateau.should_stop)
    assert rates == [0.1, 0.05, 0.05] and stops == [False, False, True]
    plateau.check_end()  # it has a best checkpoint, though an old one


@pytest.mark.parametrize("wrong", NOT_FINITE)
def test_a_schedule_saved_with_such_a_best_forgets_it(wrong: float) -> None:
    plateau = schedule()
    old = {"scale": 0.5, "best": wrong, "num_stagnant": 2, "num_since_halving": 1}
    plateau.load_state_dict(json.loads(json.dumps(old)))
    assert plateau.best is None and plateau.scale == 0.5
    with pytest.raises(RuntimeError, match="finite score"):
        plateau.check_end()
    assert plateau.observe(-3.0, 1)
    plateau.check_end()


def test_the_best_checkpoint_has_the_highest_finite_score() -> None:
    scores = [math.nan, -20.0, math.inf, None, -10.0, -math.inf, math.nan]
    committed = [Committed(f"url-{i}", i, score, {}) for i, score in enumerate(scores)]
    for chosen in (committed, committed[::-1]):
        best = best_of(chosen)
        assert best is not None and best.score == -10.0
    assert best_of([one for one in committed if one.step in (0, 2, 3, 5)]) is None


@pytest.mark.parametrize("wrong", NOT_FINITE)
def test_a_checkpoint_stores_such_a_score_as_null_with_a_mark(wrong: float, tmp_path: Path) -> None:
    save(tmp_path, snapshot(1, -9.0), snapshot(2, wrong), snapshot(3, None), keep_last=3)
    commits = [strict(path.read_bytes()) for path in sorted(tmp_path.glob("checkpoints/*/COMMIT"))]
    assert [commit["score"] for commit in commits] == [-9.0, None, None]
    assert [commit.get("not_finite") for commit in commits] == [None, str(wrong), None]
    assert_equal(load_newest(str(tmp_path)), snapshot(3))
    assert load_export(str(tmp_path)).lineage["step"] == 1, "the best one has a score"


@pytest.mark.parametrize("wrong", NOT_FINITE)
def test_checkpoints_of_earlier_versions_with_such_a_score_still_load(
    wrong: float, tmp_path: Path
) -> None:
    save(tmp_path, snapshot(1, 3.0), snapshot(2, 4.0))
    path = sorted(tmp_path.glob("checkpoints/*/COMMIT"))[-1]
    commit = json.loads(path.read_text()) | {"score": wrong}
    del commit["sha256"]
    digest = sha256(json.dumps(commit, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(commit | {"sha256": digest}))
    assert ("NaN" in path.read_text()) or ("Infinity" in path.read_text())
    assert_equal(load_newest(str(tmp_path)), snapshot(2))
    best = best_of(find_committed(str(tmp_path / "checkpoints")))
    assert best is not None and best.step == 1


def test_numbers_in_the_state_of_an_objective_come_back_as_they_were(tmp_path: Path) -> None:
    numbers = {"best": -math.inf, "limit": math.inf, "gaps": [1.5, math.nan, None], "n": 3}
    one = snapshot(1)
    one.state["objective"] = numbers
    one.state["switches"] = {"previous": {"a": 1, "nan": 0}}
    save(tmp_path, one)
    (path,) = tmp_path.glob("checkpoints/*/state.json")
    strict(path.read_bytes())
    loaded = load_newest(str(tmp_path))
    assert loaded is not None and loaded.state["switches"] == one.state["switches"]
    assert str(loaded.state["objective"]) == str(numbers)


def test_values_without_such_numbers_are_written_as_json_writes_them() -> None:
    value = {"b": [1, 2.5, "NaN", None, True], "a": {"x": (1e300, -0.0)}}
    assert to_json(value, indent=1) == json.dumps(value, indent=1)
    assert strict(to_json([math.nan, {"x": (math.inf, 1)}])) == [None, {"x": [None, 1]}]


def test_every_json_that_is_written_goes_through_a_strict_writer() -> None:
    """`json.dumps` alone would write NaN; what is excepted here is hashed or read at once."""
    loose_by_file = {"training/checkpoint.py": 1, "papers/pipeline.py": 1, "data/manifest.py": 1}
    loose_by_file |= {"composing.py": 1, "reporting.py": 1}
    for path in sorted((ROOT / "sepdist").rglob("*.py")):
        lines = [line for line in path.read_text().splitlines() if "json.dump" in line]
        loose = [line for line in lines if "allow_nan=False" not in line]
        name = str(path.relative_to(ROOT / "sepdist"))
        assert len(loose) == loose_by_file.get(name, 0), (name, loose)


def test_a_run_without_a_finite_score_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "find_committed", lambda _: [])
    limit = launch.FailureLimit("run", 5)
    plateau = schedule()
    plateau.observe(math.nan, 1)
    with pytest.raises(RuntimeError) as caught:
        plateau.check_end()
    assert "lower optim.lr=0.1 in another run_dir" in str(caught.value)
    assert limit.make_decision(RuntimeError("a host was lost")) is FailureDecision.RETRY
    assert limit.make_decision(caught.value) is FailureDecision.RAISE


def unfinished(run_dir: Path) -> list[dict[str, Any]]:
    """The states of a run's checkpoints; every JSON file of it is strict."""
    files = [*run_dir.rglob("*.json"), *run_dir.rglob("*.jsonl"), *run_dir.rglob("COMMIT")]
    assert len(files) >= 5
    for path in files:
        for text in (
            path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        ):
            strict(text)
    return [json.loads(path.read_text()) for path in sorted(run_dir.rglob("state.json"))]


@pytest.mark.slow
@pytest.mark.parametrize("every_steps", [1, 4])
def test_a_run_that_diverges_from_the_start_ends_with_an_error_after_its_last_checkpoint(
    every_steps: int, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    path = frozen(tiny_data, tmp_path, *DIVERGING, f"validation.every_steps={every_steps}")
    for _ in range(2):  # the same command again changes nothing
        with pytest.raises(
            Exception, match=rf"no validation had a finite score \({4 // every_steps} in"
        ):
            loop(path)
        assert [state["schedule"]["best"] for state in unfinished(tmp_path)][-1] is None


@pytest.mark.slow
def test_sepdist_train_ends_such_a_run_with_status_1_and_one_line_at_once(
    tiny_data: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    fresh = ("init.weights=null", "init.reinit=[]", "cluster.num_workers=1")
    arguments = train_arguments("demo/finetune", tiny_data, run_dir, *fresh, *DIVERGING)
    printed = program(*arguments, expect=1)
    (error,) = [line for line in printed.splitlines() if line.startswith("error:")]
    assert "finite score" in error and "lower optim.lr=1e+25" in error
    assert "Traceback" not in printed
    events = [json.loads(line)["event"] for line in (run_dir / "events.jsonl").open()]
    assert events.count("started") == 1, "a restart would end as this one did"
    assert unfinished(run_dir)[-1]["step"] == 4
