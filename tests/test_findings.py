"""The statistics of docs/protocol.md: what is supported, when an arm has caught up, by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import findings
from benchmarks.findings import (
    COMPARED,
    epoch_of,
    estimates,
    mean_switches,
    of_seeds,
    outcome,
    test_scores,
    words,
)
from benchmarks.silence import silent_share
from sepdist.plotting import Curves

test_scores.__test__ = False  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ([(0.1, 2.0), (0.2, 1.0)], "supported"),
        ([(-0.1, 2.0), (0.2, 1.0)], "not decided"),
        ([(-2.0, -0.1), (-1.0, -0.2)], "contradicted"),
        ([(-2.0, -0.1), (0.2, 1.0)], "not decided"),
        ([None, (0.2, 1.0)], "not decided"),
    ],
)
def test_an_effect_is_supported_where_all_intervals_are_on_the_side_of_the_claim(
    intervals: list[tuple[float, float] | None], expected: str
) -> None:
    assert outcome(*intervals) == expected


def test_differences_of_seeds_have_students_interval() -> None:
    found = of_seeds([1.0, 2.0, 3.0, 6.0])  # of docs/protocol.md; the interval by hand
    assert found["mean"] == 3.0 and found["outcome"] == "not decided"
    assert found["over_seeds"] == pytest.approx([-0.4374, 6.4374], abs=1e-3)
    assert of_seeds([1.0])["outcome"] == "not decided"


def test_an_arm_has_caught_up_in_the_first_epoch_with_the_score() -> None:
    curves = Curves([(1.0, 0.5), (2.0, 2.0), (3.0, 1.5)], [(1.0, 90.0), (2.0, 4.0), (11.0, 8.0)])
    assert [epoch_of(curves, score) for score in (0.1, 1.5, 2.5)] == [1.0, 2.0, 4.0]
    assert mean_switches(curves) == 4.0  # epochs 2 to 10


def evaluation(folder: Path, gains: list[float]) -> None:
    folder.mkdir(parents=True)
    (folder / "stage.json").write_text("{}")
    data = {"url": "d", "corpus": "c", "split": "test"}
    (folder / "results.json").write_text(json.dumps({"data": data}))
    rows = [
        f"{number},{number}+{(number + 1) % 8},{gain},{gain + 1}"
        for number, gain in enumerate(gains)
    ]
    (folder / "utterances.csv").write_text("\n".join(["id,speakers,si_snri,sdri", *rows]))


def test_the_better_arm_in_all_seeds_and_speakers_is_supported(tmp_path: Path) -> None:
    seeds = [tmp_path / f"seed-{number}" for number in range(3)]
    for number, seed in enumerate(seeds):
        for arm, level in (("ctn", 1.0), ("sslm", 2.0), ("no_guidance", 2.0), ("mixit", 3.0)):
            gains = [level + number + mixture % 2 for mixture in range(8)]
            better = 0.01 * number if arm == "sslm" else 0.0
            evaluation(seed / f"{arm}_test", [gain + better for gain in gains])
    found = test_scores(seeds, COMPARED["paper2"])
    assert found["H5 SSLM-SS over CTN, si_snri"]["mean"] == pytest.approx(1.01)
    assert found["H5 SSLM-SS over CTN, sdri"]["outcome"] == "supported"
    assert found["H6 SSLM-SS over f = 0, si_snri"]["outcome"] == "not decided"
    assert found["H7 SSLM-SS over MixIT, si_snri"]["outcome"] == "contradicted"


def test_mama_is_compared_in_the_seeds_that_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switches = {"scratch": 6.0, "ptft": 4.0, "multitask": 6.0, "longer": 6.0, "ptft_mama": 9.0}

    def curves(run_dir: str) -> Curves:
        return Curves([(1.0, 2.0)], [(2.0, switches[Path(run_dir).name])])

    monkeypatch.setattr(findings, "read_curves", curves)
    for number in range(3):
        for level, arm in enumerate(switches):
            if arm != "ptft_mama":
                evaluation(tmp_path / f"seed-{number}/{arm}_test", [1.0 * level] * 8)
    found = findings.paper1(tmp_path, None)
    assert not any("MAMA" in name for name in found)
    for number in range(2):
        evaluation(tmp_path / f"seed-{number}/ptft_mama_test", [0.5] * 8)
    found = findings.paper1(tmp_path, None)
    assert len(found["seeds"]) == 3
    assert found["fewer switches, PT-FT (MAMA)"]["seeds"] == [-3.0, -3.0]
    assert found["PT-FT (MAMA) over scratch, si_snri"]["mean"] == 0.5
    assert found["PT-FT (SE) over PT-FT (MAMA), sdri"]["mean"] == 0.5


def recognised(folder: Path, rows: list[tuple[str, int, int, int, int]]) -> Path:
    folder.mkdir(parents=True)
    names = "id,condition,num_words,mixture_errors,output_1_errors,output_2_errors,reason"
    lines = [",".join([f"{number:04d}", *map(str, row), ""]) for number, row in enumerate(rows)]
    (folder / "utterances.csv").write_text("\n".join([names, *lines, "x,OV40,,,,,unreadable"]))
    return folder


def test_words_count_the_better_output_and_weigh_utterances_by_their_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [("OV10", 10, 5, 9, 1), ("OV10", 30, 3, 1, 9), ("OV40", 20, 9, 4, 4)]
    one = recognised(tmp_path / "ctn/words", both)
    two = recognised(tmp_path / "sslm/words", [(*row[:3], 0, 0) for row in both])
    found = words([one, two])
    assert found["OV10"]["utterances"] == 2 and found["OV10"]["words"] == 40
    wer = {"mixture": 20.0, str(one): 5.0, str(two): 0.0}  # 8, 2, 0 of 40
    assert found["OV10"]["wer"] == wer
    # Drawn utterances: twice the first, 8 of 20 words; twice the second, 4 of 60; or both.
    difference = found["OV10"]["differences"][f"{one} - mixture"]
    assert difference["mean"] == -15.0
    assert difference["interval"] == pytest.approx([-40.0, -100 * 4 / 60])
    difference = found["OV40"]["differences"][f"{two} - {one}"]
    assert difference == {"mean": -20.0, "interval": [-20.0, -20.0]}
    shorter = recognised(tmp_path / "shorter", both[1:])  # its rows have other names
    assert words([one, shorter])["OV10"]["utterances"] == 1
    assert "left out, not recognised in all folders: 2" in capsys.readouterr().err


def estimated(folder: Path, rows: list[tuple[str, float, float, float, float]]) -> Path:
    folder.mkdir()
    lines = [",".join([*map(str, row), ""]) for row in rows] + ["9-1-1_8-1-1,,,,,silent"]
    names = "id,true_1,true_2,predicted_1,predicted_2,reason"
    (folder / "utterances.csv").write_text("\n".join([names, *lines]))
    return folder


def test_an_estimator_is_judged_by_means_of_outputs_and_beside_a_constant(tmp_path: Path) -> None:
    """True 0, 2, 4, predicted 1, 1, 4: covariance 2, variances 8/3 and 2."""
    rows = [
        ("1-5-1_2-5-1", -1.0, 1.0, 2.0, 0.0),
        ("3-5-1_4-5-1", 2.0, 2.0, 0.0, 2.0),
        ("1-5-2_4-5-2", 3.0, 5.0, 4.0, 4.0),
    ]
    found = estimates(estimated(tmp_path / "a", rows))
    assert (found["mixtures"], found["speakers"]) == (3, 4)
    assert found["true_sd"] == pytest.approx((8 / 3) ** 0.5)
    assert found["lcc"]["value"] == pytest.approx(2 / (8 / 3 * 2) ** 0.5)
    values = {name: found[name]["value"] for name in ("mae", "bias", "mae_of_true_mean")}
    assert values == pytest.approx({"mae": 2 / 3, "bias": 0, "mae_of_true_mean": 4 / 3})


def test_the_interval_of_an_estimator_holds_what_drawn_speakers_give(tmp_path: Path) -> None:
    speakers = [(a, b) for a in range(8) for b in range(a)]
    rows = [(f"{a}-1-1_{b}-1-1", a + b, a + b, a + b + 0.5, a + b + 0.5) for a, b in speakers]
    found = estimates(estimated(tmp_path / "exact", rows))  # half a dB too much, all of it
    assert found["lcc"]["interval"] == pytest.approx([1, 1])
    assert found["bias"]["interval"] == found["mae"]["interval"] == [0.5, 0.5]
    rows = [(one, true, true, true + 2 * (one[0] == "7"), true) for one, true, *_ in rows]
    low, high = estimates(estimated(tmp_path / "one", rows))["bias"]["interval"]
    # 7 of 28 mixtures have speaker 7: 1 dB each. Drawn 0 to 4 times, they weigh 0 to over a half.
    assert low == 0 and 0.45 < high < 0.75


def test_frames_far_below_the_loudest_of_their_output_are_silent() -> None:
    """Frames of two samples: one of four is silent, then two; the ninth sample is cut."""
    outputs = np.array([[1, -1, 0.1, 0.1, 0.02, 0, 0.005, 0, 0], [8, 8, 0, 0, 0.07, 0.07, 1, 1, 0]])
    assert silent_share(outputs, 2) == 3 / 8
