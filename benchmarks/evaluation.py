"""Measure evaluation: our `sepdist evaluate` beside Asteroid's and SpeechBrain's ways.

    python -m benchmarks.evaluation [--quick]

Prints one JSON line. Every side reads the same generated mixtures of 3.5 to 5 s at 8 kHz, separates
each with the same weights (Conv-TasNet beside Asteroid, SepFormer beside SpeechBrain) and computes
SI-SNR and SDR of mixture and estimates, in one thread, in turns. Asteroid's way is that of its
recipes' eval.py: a forward pass, the permutation by `PITLossWrapper`, `get_metrics` of si_sdr and
sdr. SpeechBrain's is that of its separation recipes: a forward pass, `get_si_snr_with_pitwrapper`
and mir_eval's `bss_eval_sources`, for the mixture and the estimates.

Figures are CPU seconds per second of audio: `separate` (reading and separation) and `score`; the
best of several turns of every mixture, added up. `score_ms` is per mixture; `before_sdr_ms` is the
cost of the two calls of fast_bss_eval that our SDR replaced. `program` is the whole of our
`evaluate`, with loading, compiling, figures and files. `sdr_difference` is the largest from the
peer's, in dB.

Peers: pip install --no-deps asteroid asteroid-filterbanks pb_bss_eval mir_eval decorator einops
cached_property speechbrain hyperpyyaml ruamel.yaml sentencepiece joblib.
"""

import argparse
import io
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.signal
import torch
from rich.console import Console
from torch import nn

from benchmarks.peers import export_with_peer
from sepdist.config import EvaluateConfig
from sepdist.data import shards
from sepdist.data.records import Batch, Mixture
from sepdist.inference import evaluation, scoring
from tests.support.shard_sets import write_shard

RATE = 8000
PAIRS = {"conv_tasnet": ("asteroid", 8), "sepformer": ("speechbrain", 3)}  # peer, mixtures
Side = tuple[Callable[[int], Any], Callable[[Any], float]]  # separate a mixture, mean SDR of that


def write_data(url: str, num_mixtures: int) -> None:
    """Mixtures of two sources with the spectrum and the slow changes of speech."""

    def members(number: int) -> dict[str, np.ndarray]:
        draw = np.random.default_rng(number)
        noise = draw.standard_normal((2, int(RATE * draw.uniform(3.5, 5.0))))
        level = np.abs(
            scipy.signal.lfilter([0.001], [1, -0.999], draw.standard_normal(noise.shape))
        )
        waves = scipy.signal.lfilter([1], [1, -1.6, 0.8], noise) * level
        waves *= 0.3 / np.abs(waves).max()
        return {"s1": waves[0].astype(np.float32), "s2": waves[1].astype(np.float32)}

    mixtures = [
        Mixture(f"m{i}", (f"a{i}", f"b{i}"), RATE, partial(members, i)) for i in range(num_mixtures)
    ]
    name = shards.shard_name("generated", "test", 0)
    shards.write_manifest(url, "generated", "test", RATE, [write_shard(mixtures, url, name)])


def ours(cfg: EvaluateConfig) -> Side:
    separate = scoring.mixture_separator(cfg)
    return separate, lambda found: evaluation.score_utterance(*found[:2], RATE)["sdr"]


def read_and_forward(cfg: EvaluateConfig, peer: nn.Module) -> Callable[[int], Any]:
    dataset = scoring.open_dataset(cfg)

    def separate(number: int) -> tuple[torch.Tensor, Batch]:
        batch = dataset.full(number, scoring.NO_LIMIT_SECONDS)
        with torch.no_grad():
            return peer(batch.mixture), batch

    return separate


def asteroid(cfg: EvaluateConfig, peer: nn.Module) -> Side:
    from asteroid.losses import PITLossWrapper, pairwise_neg_sisdr
    from asteroid.metrics import get_metrics

    loss = PITLossWrapper(pairwise_neg_sisdr, pit_from="pw_mtx")

    def score(found: tuple[torch.Tensor, Batch]) -> float:
        estimates, batch = found
        _, ordered = loss(estimates, batch.sources, return_est=True)
        waves = (batch.mixture.numpy(), batch.sources[0].numpy(), ordered[0].numpy())
        return get_metrics(*waves, sample_rate=RATE, metrics_list=["si_sdr", "sdr"])["sdr"]

    return read_and_forward(cfg, peer), score


def speechbrain(cfg: EvaluateConfig, peer: nn.Module) -> Side:
    from mir_eval.separation import bss_eval_sources
    from speechbrain.nnet.losses import get_si_snr_with_pitwrapper

    def score(found: tuple[torch.Tensor, Batch]) -> float:
        estimates_BST, batch = found
        sources_BTS = batch.sources.transpose(1, 2)
        mixture_BTS = batch.mixture[..., None].expand_as(sources_BTS)
        means = []
        for waves_BTS in (mixture_BTS, estimates_BST.transpose(1, 2)):
            get_si_snr_with_pitwrapper(sources_BTS, waves_BTS).mean()
            sdr, *_ = bss_eval_sources(batch.sources[0].numpy(), waves_BTS[0].T.numpy())
            means.append(sdr.mean())
        return means[1]

    return read_and_forward(cfg, peer), score


def cpu_of(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    began = time.process_time()
    result = function(*arguments)
    return time.process_time() - began, result


def compare(sides: dict[str, Side], num_mixtures: int, turns: int) -> dict[str, Any]:
    """Best CPU seconds of every mixture by side and half; and the SDR that each side finds."""
    seconds = {name: np.full((2, num_mixtures), np.inf) for name in sides}
    sdr = {name: np.zeros(num_mixtures) for name in sides}
    for turn in range(turns + 1):  # the first warms up, on one mixture
        for number in range(num_mixtures if turn else 1):
            for name, (separate, score) in sides.items():
                first, found = cpu_of(separate, number)
                second, sdr[name][number] = cpu_of(score, found)
                if turn:
                    seconds[name][:, number] = np.minimum(seconds[name][:, number], (first, second))
    return {"seconds": {name: rows.sum(1) for name, rows in seconds.items()}, "sdr": sdr}


def measure(preset: str, work: Path, num_mixtures: int, turns: int) -> dict[str, Any]:
    peer_name, _ = PAIRS[preset]
    peer = export_with_peer(preset, work / preset)
    cfg = EvaluateConfig(
        model=str(work / preset),
        data=str(work / "data"),
        output=str(work / f"{preset}-scores"),
        cache_dir=str(work / "cache"),
        num_mixtures=num_mixtures,
        num_workers=0,
        num_listening=0,
    )
    with scoring.single_threaded():
        program, results = cpu_of(evaluation.evaluate, cfg, Console(file=io.StringIO()))
        audio_seconds = 3600 * results["hours"]
        sides = {"ours": ours(cfg), peer_name: globals()[peer_name](cfg, peer)}
        found = compare(sides, num_mixtures, turns)
    line: dict[str, Any] = {"mixtures": num_mixtures, "audio_seconds": round(audio_seconds, 1)}
    for name, (separate, score) in found["seconds"].items():
        line[name] = {
            "separate": round(separate / audio_seconds, 4),
            "score": round(score / audio_seconds, 5),
            "score_ms": round(1000 * score / num_mixtures, 1),
        }
    mine, theirs = (found["seconds"][name] for name in ("ours", peer_name))
    line["ratio"] = round(float(theirs.sum() / mine.sum()), 2)
    line["ratio_separate"], line["ratio_score"] = (theirs / mine).round(2).tolist()
    line["program"] = round(program / audio_seconds, 3)
    difference = float(np.abs(found["sdr"]["ours"] - found["sdr"][peer_name]).max())
    line["sdr_difference"] = float(f"{difference:.1g}")
    return line


def cost_before(data: str, cache: str, num_mixtures: int) -> float:
    """CPU ms per mixture of fast_bss_eval's SDR of mixture and estimates, best of three turns."""
    import fast_bss_eval

    dataset = scoring.open_dataset(EvaluateConfig(data=data, cache_dir=cache))
    best = np.full(num_mixtures, np.inf)
    with scoring.single_threaded():
        for _ in range(3):
            for number in range(num_mixtures):
                batch = dataset.full(number, scoring.NO_LIMIT_SECONDS)
                sources = batch.sources[0].double().numpy()
                mixtures = np.broadcast_to(batch.mixture.double().numpy(), sources.shape)
                for_both = [(sources, mixtures), (sources, sources[::-1] + 0.1 * sources)]
                sdr = partial(fast_bss_eval.sdr, clamp_db=100.0)
                took = sum(cpu_of(sdr, *given)[0] for given in for_both)
                best[number] = min(best[number], took)
    return float(1000 * best.mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two mixtures, one turn")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    report: dict[str, Any] = {"name": "evaluation", "torch": torch.__version__}
    goals: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_data(str(work / "data"), 8)
        for preset, (peer_name, num_mixtures) in PAIRS.items():
            try:
                shape = (2, 1) if quick else (num_mixtures, 3 if num_mixtures > 3 else 1)
                line = report[preset] = measure(preset, work, *shape)
            except ImportError as error:
                report[preset] = {"missing": str(error)}
                continue
            goals[f"{preset}: times {peer_name}'s evaluation"] = (3.0, line["ratio"])
        report["before_sdr_ms"] = round(cost_before(str(work / "data"), str(work / "cache"), 8), 1)
    report["goals"] = {
        what: {"goal": goal, "measured": found, "met": bool(found >= goal)}
        for what, (goal, found) in goals.items()
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
