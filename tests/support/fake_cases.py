"""Models, objectives, steps, validation, inference on the fake device: a JSON line of each's waits.

    python -m tests.support.fake_cases [--quick] [--table]

A case is an objective of configs/objective with a model of configs/model that it fits, in training
(forward and backward) or validation, in fp32 or under bf16 autocast. `--quick` has each objective
with one model and each model with one objective; `--table` prints lines to read.
"""

import functools
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from torch import nn

from sepdist import slots
from sepdist.config import ValidationConfig
from sepdist.data.records import Batch
from sepdist.inference import estimation, scoring
from sepdist.inference.separator import Separator
from sepdist.objectives.contract import Objective, with_defaults
from sepdist.objectives.semisupervised import SemiSupervised
from sepdist.training.engine import DeepSpeedEngine
from sepdist.training.validation import listen, validate
from sepdist.training.world import World
from tests.support.batches import batch_of
from tests.support.fake_device import FakeDevice
from tests.support.ssqp import TINY

CONFIGS = Path(__file__).parents[2] / "configs"
CODEC = {"num_filters": 8, "kernel_size": 16, "stride": 8}
CONV = CODEC | {"num_bottleneck": 4, "num_hidden": 6, "num_skip": 4, "num_blocks": 1}
CONV |= {"num_repeats": 1, "compile": False}
CONTEXT = {"num_targets": 8, "kernel_size": 3, "stride": 2, "num_groups": 2, "num_hidden": 8}
CONTEXT |= {"num_heads": 2, "num_feedforward": 8, "num_layers": 1, "num_position_taps": 3}
DUAL_PATH = CODEC | {"num_hidden": 4, "chunk_size": 4}
SEPARATORS: dict[str, dict[str, Any]] = {
    "conv_tasnet": CONV,
    "conv_tasnet_small": CONV | {"num_blocks": 2},
    "conv_tasnet_context": CONTEXT,
    "dprnn": DUAL_PATH | {"num_bottleneck": 4, "num_repeats": 1},
    "dptnet": DUAL_PATH | {"num_heads": 2, "num_repeats": 1},
    "sandglasset": DUAL_PATH | {"num_features": 4, "num_heads": 2, "num_blocks": 3},
    "sepformer": DUAL_PATH | {"num_blocks": 1, "num_layers": 1, "num_heads": 2},
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
    for outputs in (4, 8):
        models = SEPARATORS if outputs == 4 else one
        yield from cases("mixit", f"{outputs}", outputs, batch(2), models)
        more = {"data_set": "unlabelled"}
        yield from cases("mixit", f"{outputs} labelled", outputs, batch(2), models, **more)
        kind = "training"
        yield from cases(
            "mixit", f"{outputs} unlabelled", outputs, unlabelled, models, kind, **more
        )
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


def run(case: Case, bf16: bool) -> list[str]:
    """What a run on the fake device waits for."""
    with FakeDevice() as fake:
        model = case.model().to(fake.device).train(case.training)
        objective = case.objective()
        objective.check_model(model)
        if isinstance(objective, SemiSupervised):
            objective.estimator.to(fake.device)  # as its first batch does
        fake.waits.clear()
        with torch.autocast("fake", torch.bfloat16, bf16), torch.set_grad_enabled(case.training):
            loss, metrics = objective(model, case.batch.to(fake.device))
        if case.training:
            loss.backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            assert grads and all(grad.dtype == torch.float32 for grad in grads)
        for name, value in (metrics | {"loss": loss}).items():
            assert value.device == fake.device, f"{name} is on {value.device}"
        return list(fake.waits)


class PlainEngine(DeepSpeedEngine):
    """The engine with a plain optimizer in the place of DeepSpeed, which needs a real device."""

    def _initialize(self, options: dict[str, Any]) -> None:
        self._optimizer = self.make_optimizer(list(self.model.parameters()))
        self._engine = SimpleNamespace(step=self._optimizer.step)


def new_engine(fake: FakeDevice, name: str, **options: Any) -> PlainEngine:
    make = functools.partial(torch.optim.Adam, lr=1e-3, fused=True)
    sizes = {"seed": 0, "num_virtual_shards": 2, "micro_batch": NUM_ITEMS}
    model, world = small("dprnn", 2), World(0, 1, fake.device)
    return PlainEngine(model, objective(name)(), make, world, **sizes, **options)


def steps(fake: FakeDevice, **options: Any) -> list[str]:
    """Two steps that are not read wait for nothing, and a third waits once, to be read."""
    engine = new_engine(fake, "separation", **options)
    batches = [batch(2), batch(2)]
    fake.waits.clear()
    for _ in range(2):
        assert engine.step(batches, 10.0, read=False) == []
    waits = list(fake.waits)
    assert len(engine.step(batches)) == 3
    return waits + fake.waits[len(waits) + 1 :]


def dataset_of(given: Batch) -> Any:
    """Stands for a data set that holds the first item of a batch, twice."""
    names = ("mixture", "sources", "estimates", "noise", "positions", "lengths")
    one = replace(given, ids=given.ids[:1], **{name: getattr(given, name)[:1] for name in names})
    manifest = SimpleNamespace(num_samples=2, sample_rate=8000)
    return SimpleNamespace(manifest=manifest, full=lambda number, seconds: one)


def validating(fake: FakeDevice) -> list[str]:
    """Validation and its audio wait where they bring their results to the host alone."""
    engine, dataset = new_engine(fake, "separation"), dataset_of(batch(2))
    options, reporter = ValidationConfig(num_mixtures=2, num_listening=1), mock.Mock()
    fake.waits.clear()
    assert "si_snr" in validate(engine, engine.objective, dataset, engine.world, options)
    listen(engine, engine.objective, dataset, reporter, 1, options)
    assert reporter.audio.call_count == 5
    return [one for one in fake.waits if "training/validation.py" not in one]


def inferring(fake: FakeDevice) -> list[str]:
    """Separation, evaluation and estimation copy inputs there and results back, nothing else."""
    separator = Separator(small("sepformer", 2), 8000, fake.device)
    cfg: Any = SimpleNamespace(model="", max_seconds=1.0)
    with (
        mock.patch.multiple(
            scoring,
            device_of=lambda cfg: fake.device,
            open_dataset=mock.DEFAULT,
            load_export=mock.DEFAULT,
        ) as patched,
        mock.patch.object(estimation, "load_export") as load,
    ):
        patched["open_dataset"].return_value = dataset_of(batch(2))
        patched["load_export"].return_value.model = small("conv_tasnet", 2).eval()
        load.return_value.model = small("sisnr_cnn", 2).eval()
        separate, predict = scoring.mixture_separator(cfg), estimation.predictor(cfg)
        fake.waits.clear()
        estimates, _ = separate(0)
        assert estimates.shape == (2, 160) and predict(0)["predicted_2"] == 1.0
    assert separator(np.ones(20000, np.float32), 8000).shape == (2, 20000)
    return [one for one in fake.waits if "_to_copy" not in one] + fake.waits[7:]


def mistakes(fake: FakeDevice) -> list[str]:
    """What the fake device must refuse or record, and did not."""
    x = torch.randn(3, device=fake.device)
    recorded: dict[str, Callable[[], Any]] = {
        "item": x.sum().item,
        "cpu": x.cpu,
        "bool": lambda: bool(x[0] > 0),
        "copy to the device": lambda: torch.ones(3).to(fake.device),
        "tensor": lambda: torch.tensor([1.0, 2.0], device=fake.device),
        "assignment": lambda: x.__setitem__(0, torch.ones(1)[0]),
        "host indices": lambda: x[torch.tensor([0, 1])],
        "list": lambda: x[[0, 1]],
    }
    refused: dict[str, Callable[[], Any]] = {
        "sum": lambda: x + torch.ones(3),
        "mask": lambda: x[x > 0],
        "nonzero": x.nonzero,
        "tolist": x.tolist,
    }
    missed = []
    for name, mistake in (recorded | refused).items():
        fake.waits.clear()
        try:
            mistake()
        except RuntimeError:
            missed += [] if name in refused else [f"{name} is refused"]
        else:
            missed += [] if name in recorded and fake.waits else [name]
    fake.waits.clear()
    (x + 1.0 + torch.tensor(1.0)).copy_(torch.ones(3), non_blocking=True)
    return missed + fake.waits


PATHS: dict[str, Callable[[FakeDevice], list[str]]] = {
    "the fake device": mistakes,
    "steps, merged": functools.partial(steps, reduction="native", merge_shards=0),
    "steps, native": functools.partial(steps, reduction="native", merge_shards=1),
    "steps, canonical, bf16": functools.partial(steps, precision="bf16"),
    "validation": validating,
    "inference": inferring,
}


def rows(quickly: bool) -> Iterator[dict[str, Any]]:
    """What each path and each case waits for, and what went wrong."""

    def tried(names: Iterable[str], call: Callable[[], list[str]], **more: str) -> dict[str, Any]:
        try:
            return {"case": " ".join(names), "waits": call(), "error": "", **more}
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:1000]
            return {"case": " ".join(names), "waits": [], "error": reason, **more}

    for name, path in PATHS.items():
        with FakeDevice() as fake:
            yield tried([name], functools.partial(path, fake))
    with tempfile.TemporaryDirectory() as folder:
        for case, bf16 in chosen(every_case(Path(folder)), quickly):
            mode = "training" if case.training else "validation"
            names = (case.kind, case.label, case.preset, mode, "bf16" if bf16 else "fp32")
            call = functools.partial(run, case, bf16)
            yield tried(names, call, objective=case.kind, model=case.preset)


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


def main() -> None:
    """Print the rows."""
    for row in rows("--quick" in sys.argv):
        line = f"{row['case']:70} {len(row['waits'])} {row['waits'] or ''} {row['error']}".rstrip()
        print(line if "--table" in sys.argv else json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
