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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from sepdist.config import ValidationConfig
from sepdist.data.records import Batch
from sepdist.inference import estimation, scoring
from sepdist.inference.separator import Separator
from sepdist.objectives.semisupervised import SemiSupervised
from sepdist.training.engine import DeepSpeedEngine
from sepdist.training.validation import listen, validate
from sepdist.training.world import World
from tests.support.cases import NUM_ITEMS, Case, batch, chosen, every_case, objective, small
from tests.support.fake_device import FakeDevice


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
    to_host = ("training/validation.py", "training/world.py")
    assert len(fake.waits) <= 2, fake.waits  # one for all means, one for the audio
    return [one for one in fake.waits if not any(place in one for place in to_host)]


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
        estimates, *_ = separate(0)
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
    "steps, averaged": functools.partial(steps, ema_decay=0.9),
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


def main() -> None:
    """Print the rows."""
    for row in rows("--quick" in sys.argv):
        line = f"{row['case']:70} {len(row['waits'])} {row['waits'] or ''} {row['error']}".rstrip()
        print(line if "--table" in sys.argv else json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
