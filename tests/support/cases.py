"""Small models of configs/model, and every objective of configs/objective with those that it fits.

For tests on devices: the fake one (fake_cases.py) and real GPUs (tests/gpu).
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from sepdist import slots
from sepdist.data.records import Batch
from sepdist.objectives.contract import Objective, with_defaults
from tests.support.batches import batch_of
from tests.support.ssqp import TINY

CONFIGS = Path(__file__).parents[2] / "configs"
CODEC = {"num_filters": 8, "kernel_size": 16, "stride": 8}
CONV = CODEC | {"num_bottleneck": 4, "num_hidden": 6, "num_skip": 4, "num_blocks": 1}
CONV |= {"num_repeats": 1, "compile": False}
CONTEXT = {"num_targets": 8, "kernel_size": 3, "stride": 2, "num_groups": 2, "num_hidden": 8}
CONTEXT |= {"num_heads": 2, "num_feedforward": 8, "num_layers": 1, "num_position_taps": 3}
SPECTRA = {"fft_size": 16, "stride": 8, "num_layers": 1, "num_features": 12, "num_hidden": 10}
DUAL_PATH = CODEC | {"num_hidden": 4, "chunk_size": 4}
SEPARATORS: dict[str, dict[str, Any]] = {
    "conv_tasnet": CONV,
    "conv_tasnet_small": CONV | {"num_blocks": 2},
    "conv_tasnet_context": CONTEXT,
    "dprnn": DUAL_PATH | {"num_bottleneck": 4, "num_repeats": 1},
    "dptnet": DUAL_PATH | {"num_heads": 2, "num_repeats": 1},
    "sandglasset": DUAL_PATH | {"num_features": 4, "num_heads": 2, "num_blocks": 3},
    "sepformer": DUAL_PATH | {"num_blocks": 1, "num_layers": 1, "num_heads": 2},
    "tf_gridnet": SPECTRA | {"num_heads": 3, "num_keys": 20},
    "tf_locoformer": SPECTRA | {"num_heads": 3},
    "tf_locoformer_small": SPECTRA | {"num_heads": 3},
}
ESTIMATORS: dict[str, dict[str, Any]] = {
    "sisnr_cnn": {},
    "ssqp_wav2vec2": {"pretrained": None, "encoder": TINY["wav2vec2"] | {"num_hidden_layers": 1}},
    "ssqp_whisper": {"pretrained": None, "encoder": TINY["whisper"] | {"encoder_layers": 1}},
}
LENGTHS = {"ssqp_whisper": 800, "ssqp_wav2vec2": 600}
NUM_ITEMS = 4


@dataclass
class Case:
    """An objective, a model that it fits, and a batch."""

    kind: str  # of configs/objective
    label: str
    preset: str  # of configs/model
    model: Callable[[], nn.Module]
    objective: Callable[[], Objective]
    batch: Batch
    training: bool = True


def small(name: str, num_speakers: int, **more: Any) -> nn.Module:
    """The model of a file of configs/model with small sizes."""
    node = yaml.safe_load((CONFIGS / "model" / f"{name}.yaml").read_text())
    for part in node.pop("defaults", ["_self_"])[:-1]:
        preset, _, place = part.partition("@")
        node[place] = yaml.safe_load((CONFIGS / "model" / f"{preset}.yaml").read_text()) | CONV
        node[place]["num_speakers"] = num_speakers
    values = {"${num_speakers}": num_speakers, "${sample_rate}": 8000, "${data.crop_seconds}": 0.2}
    node = {key: values.get(str(value), value) for key, value in node.items()}
    return slots.build("model", node | (SEPARATORS | ESTIMATORS)[name] | more)


def batch(num_sources: int, length: int = 160, **more: Any) -> Batch:
    """Noise; the lengths of the items differ, and the last item's sources are silent."""
    generator = torch.Generator().manual_seed(0)
    sources = torch.randn(NUM_ITEMS, num_sources, length, generator=generator)
    sources[-1] = 0.0
    made = batch_of(sources, torch.randn(NUM_ITEMS, length, generator=generator))
    made.estimates = torch.randn(sources.shape, generator=generator)
    made.lengths[1] -= 8
    return replace(made, **more)


def objective(name: str, **arguments: Any) -> Callable[[], Objective]:
    """The objective of a file of configs/objective."""

    def make() -> Objective:
        node = yaml.safe_load((CONFIGS / "objective" / f"{name}.yaml").read_text())
        values = {"${num_speakers}": 2, "${sample_rate}": 8000, "${seed}": 1}
        node = {key: values.get(str(value), value) for key, value in (node | arguments).items()}
        if "estimator" in node:
            node["estimator"] = small(node["estimator"], 2)
        return with_defaults(slots.build("objective", node))

    return make


def cases(
    name: str,
    label: str,
    outputs: int,
    given: Batch,
    models: Mapping[str, dict[str, Any]] = SEPARATORS,
    only: str = "",
    **arguments: Any,
) -> Iterator[Case]:
    """The objective with each of the models, in training and (unless `only` is one) validation."""
    make = objective(name, **arguments)
    for model, more in models.items():
        build = functools.partial(small, model, outputs, **more)
        for kind in [only] if only else ["training", "validation"]:
            yield Case(name, label, model, build, make, given, kind == "training")


def every_case(folder: Path) -> Iterator[Case]:
    """All cases; `folder` takes a table of permutations."""
    table = folder / "permutations.csv"
    rows = "".join(f"utterance{i},{i % 2}\n" for i in range(NUM_ITEMS))
    table.write_text(f"id,permutation\n{rows}")
    fixed = {"permutations": str(table)}
    one = {"conv_tasnet": {}}
    for number in (2, 3, 4):
        models = SEPARATORS if number == 2 else one
        yield from cases("separation", f"{number}", number, batch(number), models)
        more = {"threshold": -30.0, "skip_silent": True}
        yield from cases("separation", f"{number} audible", number, batch(number), one, **more)
        yield from cases("soft_pit", f"{number}", number, batch(number), models)
        yield from cases("fixed_permutations", f"{number}", number, batch(number), models, **fixed)
    yield from cases("multitask", "separation", 3, batch(2))
    extra = batch(2, data_set="enhancement")
    yield from cases("multitask", "enhancement", 3, extra, only="training")
    yield from cases("enhancement", "1", 1, batch(1), skip_silent=True)
    unlabelled = replace(batch(2), data_set="unlabelled", sources=None)
    more = {"data_set": "unlabelled"}
    yield from cases("mixit", "4", 4, batch(2))
    yield from cases("mixit", "4 labelled", 4, batch(2), **more)
    yield from cases("mixit", "4 unlabelled", 4, unlabelled, only="training", **more)
    yield from cases("mixit", "8 labelled", 8, batch(2), one, **more)  # by every permutation
    for estimator in ESTIMATORS:
        more = {"estimator": estimator, "labelled_share": 0.5, "epoch_samples": 1}
        models = SEPARATORS if estimator == "sisnr_cnn" else one
        length = LENGTHS.get(estimator, 160)
        label = f"by {estimator}"
        yield from cases("semisupervised", label, 2, batch(2, length), models, **more)
        given = replace(batch(2, length), data_set="unlabelled", sources=None)
        yield from cases(
            "semisupervised", f"unlabelled {label}", 2, given, models, "training", **more
        )
    for estimator, sizes in ESTIMATORS.items():
        given = batch(2, LENGTHS.get(estimator, 160))
        kinds = [{}, {"mode": "otfs"}] if "mode" in str(sizes) or "ssqp" in estimator else [{}]
        for more in kinds:
            label = "otfs" if more else "otfp"
            yield from cases("quality", label, 2, given, {estimator: more}, limits=[0, 10])
    frozen = {"ssqp_wav2vec2": {"freeze": "encoder", "encoder": TINY["wavlm"]}}
    yield from cases("quality", "wavlm", 2, batch(2, 600), frozen)
    checkpointed = {"ssqp_wav2vec2": {"gradient_checkpointing": True, "encoder": TINY["hubert"]}}
    yield from cases("quality", "hubert", 2, batch(2, 600), checkpointed)
    filling = {name: {"masking": False} for name in ("conv_tasnet", "conv_tasnet_small")}
    more = {"span_seconds": 0.001, "noise_probability": 0.5}
    yield from cases("masked", "spans", 1, batch(1), filling, **more)
    yield from cases("masked", "bands", 1, batch(1), filling, **more, band_share=0.2)
    context = {"conv_tasnet_context": {}}
    for all_frames in (False, True):
        more = {"share": 0.3, "span": 3, "all_frames": all_frames}
        label = "all frames" if all_frames else "centres"
        yield from cases("contrastive", label, 1, batch(1, 400), context, **more)


def chosen(cases: Iterable[Case], quickly: bool) -> Iterator[tuple[Case, bool]]:
    """All cases in both precisions; or quickly, what is new of an objective or of a model."""
    seen: set[tuple[Any, ...]] = set()
    for case in cases:
        of_objective = (case.kind, case.label) if case.training else (case.kind,)
        for bf16, keys in ((True, {(case.preset,), of_objective}), (False, {(case.preset,)})):
            new = {(bf16, case.training, *key) for key in keys} - seen
            if new or not quickly:
                seen |= new
                yield case, bf16
