"""Answer the hypotheses of docs/protocol.md from the folders of its pipelines.

    python -m benchmarks.findings --paper1 runs/real-paper1 --figure docs/figures/real_paper1.png
    python -m benchmarks.findings --paper2 runs/real-paper2
    python -m benchmarks.findings --estimates runs/real-paper2-gates/seed-0/ssqp_on_ctn
    python -m benchmarks.findings --words measured/ctn measured/sslm

Prints one JSON object. For each hypothesis: the difference by seed on the side that the paper
claims, its mean, Student's interval over seeds, and for test scores the interval of a bootstrap
over seeds and speakers; `outcome` is supported, contradicted or not decided, as the protocol has
it. Seeds that lack an evaluation are named and left out. The figure shows the curves of paper 1
(its figure 2): mean over seeds, from the least to the greatest. Words are those of outputs of
`sepdist recognise` on the same utterances: word error rates by overlap, and differences with the
interval of a bootstrap over utterances. Estimates are outputs of `sepdist estimate`, means of the
outputs of each mixture: correlation, mean absolute and mean error with intervals of a bootstrap
over speakers, beside the spread of the true SI-SNR and the absolute error of its mean as a guess.
"""

import argparse
import csv
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from sepdist.config import CompareConfig
from sepdist.inference.comparison import compare
from sepdist.metrics.intervals import speakers_in, t_interval
from sepdist.papers.figures import read_curves, read_predictions
from sepdist.plotting import Curves, to_png
from sepdist.reporting import to_json
from sepdist.seeding import rng

ARMS = {
    "scratch": "from scratch",
    "ptft": "PT-FT (SE)",
    "multitask": "multi-task (SE)",
    "longer": "from scratch, twice as long",
}
EPOCHS = range(2, 11)  # over which switch rates are averaged
ENDS = (0.025, 0.975)  # quantiles of a bootstrap
PAPER_SWITCHES = (15, 35)  # % that scratch and multi-task often had on Libri2Mix, section 5.2
COMPARED = {  # hypothesis: a, b; the claim is that b has the higher score
    "paper1": {
        "H3 PT-FT over scratch": ("scratch", "ptft"),
        "H3' PT-FT over longer": ("longer", "ptft"),
        "H4 PT-FT over multi-task": ("multitask", "ptft"),
        "multi-task over scratch": ("scratch", "multitask"),
    },
    "mama": {
        "PT-FT (MAMA) over scratch": ("scratch", "ptft_mama"),
        "PT-FT (SE) over PT-FT (MAMA)": ("ptft_mama", "ptft"),
    },
    "paper2": {
        "H5 SSLM-SS over CTN": ("ctn", "sslm"),
        "H6 SSLM-SS over f = 0": ("no_guidance", "sslm"),
        "H7 SSLM-SS over MixIT": ("mixit", "sslm"),
        "MixIT over CTN": ("ctn", "mixit"),
    },
}


def outcome(*intervals: Sequence[float] | None) -> str:
    """What the protocol calls an effect whose intervals these are, claimed to be positive."""
    if any(one is None for one in intervals):
        return "not decided"
    lows, highs = zip(*(one for one in intervals if one), strict=True)
    return "supported" if min(lows) > 0 else "contradicted" if max(highs) < 0 else "not decided"


def of_seeds(values: Sequence[float]) -> dict[str, Any]:
    """A difference by seed that the paper claims to be positive."""
    interval = t_interval(np.array(values))
    found = {"seeds": list(values), "mean": float(np.mean(values)), "over_seeds": interval}
    return found | {"outcome": outcome(interval)}


def mean_switches(curves: Curves) -> float:
    """Label switches in %, mean over EPOCHS."""
    return float(np.mean([rate for epoch, rate in curves.switches if round(epoch) in EPOCHS]))


def epoch_of(curves: Curves, score: float) -> float:
    """The first epoch with at least this validation score; one more than the last if none has."""
    reached = [epoch for epoch, value in curves.si_snr if value >= score]
    return reached[0] if reached else curves.si_snr[-1][0] + 1


def seeds_of(root: Path, arms: Sequence[str]) -> list[Path]:
    """The folders of the seeds in which every arm has been tested."""
    found = sorted(root.glob("seed-*"), key=lambda one: int(one.name.removeprefix("seed-")))
    done = [one for one in found if is_tested(one, arms)]
    if len(done) < len(found):
        left = ", ".join(one.name for one in found if one not in done)
        Console(stderr=True).print(f"left out, not all arms are tested: {left}")
    if not done:
        raise SystemExit(f"{root}: no seed in which all of {', '.join(arms)} are tested")
    return done


def is_tested(seed: Path, arms: Sequence[str]) -> bool:
    """Whether every one of these arms has been tested with this seed."""
    return all((seed / f"{arm}_test/stage.json").exists() for arm in arms)


def test_scores(seeds: Sequence[Path], pairs: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Compare the test scores of pairs of arms."""
    found = {}
    for name, pair in pairs.items():
        a, b = (f"[{','.join(str(one / f'{arm}_test') for one in seeds)}]" for arm in pair)
        several = len(seeds) > 1
        a, b = (a, b) if several else (a[1:-1], b[1:-1])
        differences = compare(CompareConfig(a, b), Console(stderr=True))["differences"]
        for metric in ("si_snri", "sdri"):
            one = {"over_seeds": None} | differences[metric]
            one["outcome"] = outcome(one["over_seeds"], one["interval"])
            found[f"{name}, {metric}"] = one
    return found


def paper1(root: Path, figure: Path | None) -> dict[str, Any]:
    """H1 to H4, and MAMA where it was run."""
    seeds = seeds_of(root, list(ARMS))
    curves = {arm: [read_curves(str(one / arm)) for one in seeds] for arm in ARMS}
    last = [one.si_snr[-1][1] for one in curves["scratch"]]
    switches = {arm: [mean_switches(one) for one in runs] for arm, runs in curves.items()}
    reached = {
        arm: [epoch_of(one, score) for one, score in zip(runs, last, strict=True)]
        for arm, runs in curves.items()
    }

    def less(values: Mapping[str, Sequence[float]], arm: str) -> dict[str, Any]:
        return of_seeds([a - b for a, b in zip(values["scratch"], values[arm], strict=True)])

    if figure:
        figure.write_bytes(to_png(draw(curves)))
    return {
        "seeds": [one.name for one in seeds],
        "switch_percent": switches,
        "epoch_of_last_scratch_score": reached,
        "H1 fewer switches, PT-FT": less(switches, "ptft"),
        "fewer switches, multi-task": less(switches, "multitask"),
        "H2 epochs earlier, PT-FT": less(reached, "ptft"),
        **test_scores(seeds, COMPARED["paper1"]),
        **mama([one for one in seeds if is_tested(one, ["ptft_mama"])]),
    }


def mama(seeds: Sequence[Path]) -> dict[str, Any]:
    """PT-FT (MAMA) beside scratch and PT-FT (SE) in the seeds that have it."""
    if not seeds:
        return {}
    before, after = (
        [mean_switches(read_curves(str(one / arm))) for one in seeds]
        for arm in ("scratch", "ptft_mama")
    )
    fewer = of_seeds([a - b for a, b in zip(before, after, strict=True)])
    return {"fewer switches, PT-FT (MAMA)": fewer, **test_scores(seeds, COMPARED["mama"])}


def draw(curves: Mapping[str, Sequence[Curves]]) -> Figure:
    """Validation SI-SNR over label switches, by epoch of the separation data."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    for number, (arm, runs) in enumerate(curves.items()):
        for axes, points in (
            (upper, [one.si_snr for one in runs]),
            (lower, [one.switches for one in runs]),
        ):
            epochs = [epoch for epoch, _ in points[0]]
            values_EN = np.array([[value for _, value in one] for one in points])
            colour, label = f"C{number}", ARMS[arm]
            axes.plot(epochs, values_EN.mean(0), color=colour, label=label)
            axes.fill_between(
                epochs, values_EN.min(0), values_EN.max(0), color=colour, alpha=0.2, lw=0
            )
    lower.axhspan(*PAPER_SWITCHES, color="0.9", zorder=0, label="paper: often, but for PT-FT")
    upper.set(ylabel="validation SI-SNR in dB")
    lower.set(xlabel="epoch", ylabel="label switches in %", ylim=(0, None))
    upper.legend()
    lower.legend()
    return figure


def words(folders: Sequence[Path]) -> dict[str, Any]:
    """Word error rates by condition of the mixtures and of each folder's model."""
    read = {}
    for folder in map(str, folders):
        rows = csv.DictReader(Path(folder, "utterances.csv").read_text().splitlines())
        read[folder] = {(row["condition"], row["id"]): row for row in rows if not row["reason"]}
    names = [name for name in read[str(folders[0])] if all(name in rows for rows in read.values())]
    if left_out := max(map(len, read.values())) - len(names):
        Console(stderr=True).print(f"left out, not recognised in all folders: {left_out}")
    found = {}
    for condition in dict.fromkeys(condition for condition, _ in names):
        own = [name for name in names if name[0] == condition]
        first = read[str(folders[0])]
        errors = {"mixture": [int(first[name]["mixture_errors"]) for name in own]}
        errors |= {
            folder: [best_output(rows[name]) for name in own] for folder, rows in read.items()
        }
        words_N, errors_KN = (
            np.array([int(first[name]["num_words"]) for name in own]),
            np.array([*errors.values()]),
        )
        draws_RN = rng(0, "bootstrap over utterances").integers(len(own), size=(10_000, len(own)))
        rates_RK = 100 * errors_KN.T[draws_RN].sum(1) / words_N[draws_RN].sum(1)[:, None]
        rates_K = (100 * errors_KN.sum(1) / words_N.sum()).tolist()
        found[condition] = {
            "utterances": len(own),
            "words": int(words_N.sum()),
            "wer": dict(zip(errors, rates_K, strict=True)),
            "differences": {
                f"{b} - {a}": {
                    "mean": rates_K[j] - rates_K[i],
                    "interval": np.quantile(rates_RK[:, j] - rates_RK[:, i], ENDS).tolist(),
                }
                for (i, a), (j, b) in itertools.combinations(enumerate(errors), 2)
            },
        }
    return found


def best_output(row: Mapping[str, str]) -> int:
    """The word errors of the output with the fewest, as LibriCSS counts."""
    return min(int(value) for key, value in row.items() if re.fullmatch(r"output_\d+_errors", key))


def estimates(folder: Path) -> dict[str, Any]:
    """How well SI-SNR was estimated, with intervals over the speakers, whom the ids name."""
    true_N, predicted_N = read_predictions(str(folder))
    rows = csv.DictReader((folder / "utterances.csv").read_text().splitlines())
    ids = [row["id"] for row in rows if not row["reason"]]
    names = ["+".join(one.split("-")[0] for one in each.split("_")) for each in ids]
    has_NP = speakers_in(names)
    num = has_NP.shape[1]
    counts_RP = rng(0, "bootstrap over speakers").multinomial(num, np.full(num, 1 / num), 2000)
    weights_RN = np.prod(counts_RP[:, None] ** has_NP, axis=2)
    weights_RN = weights_RN[np.count_nonzero(weights_RN, axis=1) > 2]
    with np.errstate(invalid="ignore"):  # of draws whose mixtures are all alike
        draws = [agreement(true_N, predicted_N, weights_N) for weights_N in weights_RN]
    return {"mixtures": len(ids), "speakers": num, "true_sd": float(true_N.std())} | {
        name: {
            "value": value,
            "interval": np.nanquantile([one[name] for one in draws], ENDS).tolist(),
        }
        for name, value in agreement(true_N, predicted_N, np.ones(len(ids))).items()
    }


def agreement(
    true_N: np.ndarray, predicted_N: np.ndarray, weights_N: np.ndarray
) -> dict[str, float]:
    """Pearson's correlation, mean absolute and mean error; the absolute error of the true mean."""
    covariance = np.cov(true_N, predicted_N, aweights=weights_N, ddof=0)
    mean = np.average(true_N, weights=weights_N)
    return {
        "lcc": float(covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])),
        "mae": float(np.average(np.abs(predicted_N - true_N), weights=weights_N)),
        "bias": float(np.average(predicted_N - true_N, weights=weights_N)),
        "mae_of_true_mean": float(np.average(np.abs(mean - true_N), weights=weights_N)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--paper1", type=Path, help="output of experiment=real/paper1")
    parser.add_argument("--paper2", type=Path, help="output of experiment=real/paper2")
    parser.add_argument("--figure", type=Path, help="PNG file for the curves of paper 1")
    parser.add_argument("--estimates", type=Path, nargs="+", help="outputs of sepdist estimate")
    parser.add_argument("--words", type=Path, nargs="+", help="outputs of sepdist recognise")
    given = parser.parse_args()
    results: dict[str, Any] = {}
    if given.paper1:
        results["paper1"] = paper1(given.paper1, given.figure)
    if given.paper2:
        arms = sorted({arm for pair in COMPARED["paper2"].values() for arm in pair})
        results["paper2"] = test_scores(seeds_of(given.paper2, arms), COMPARED["paper2"])
    if given.estimates:
        results["estimates"] = {str(one): estimates(one) for one in given.estimates}
    if given.words:
        results["words"] = words(given.words)
    print(to_json(results, indent=1))


if __name__ == "__main__":
    main()
