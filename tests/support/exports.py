"""Exports of a tiny model, signals and oracles of their scores."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import yaml
from torch import nn

from sepdist import seeding, slots
from sepdist.data.records import Batch

RATE = 8000

MODEL = {
    "_target_": "sepdist.models.conv_tasnet.ConvTasNet",
    "num_speakers": 2,
    "num_filters": 16,
    "num_bottleneck": 8,
    "num_hidden": 16,
    "num_skip": 8,
    "num_blocks": 2,
    "num_repeats": 1,
    "compile": False,
}


# A part that writes a file, which nothing may build.
PUT = {"_target_": "sepdist.storage.put_bytes", "url": "~/mark", "data": "x"}


def voices(num_samples: int = 4000, seed: int = 0, num: int = 2) -> np.ndarray:
    waves = 0.1 * np.random.default_rng(seed).standard_normal((num, num_samples))
    return waves.astype(np.float32)


def batch_of(sources: np.ndarray, noise: np.ndarray | None = None) -> Batch:
    mixture = sources.sum(0) + (0 if noise is None else noise)
    return Batch(
        ids=["talk-7"],
        positions=torch.tensor([0]),
        mixture=torch.from_numpy(mixture)[None],
        sources=torch.from_numpy(sources)[None],
        noise=None if noise is None else torch.from_numpy(noise)[None],
        lengths=torch.tensor([sources.shape[1]]),
        speakers=[("anna", "bert")],
    )


def oracle_si_snr(estimate: np.ndarray, source: np.ndarray) -> float:
    """SI-SNR by the correlation r: the projection keeps r^2 of the energy and leaves 1 - r^2."""
    r = np.corrcoef(estimate.astype(np.float64), source.astype(np.float64))[0, 1]
    with np.errstate(divide="ignore"):  # an exact estimate: infinity
        return 10 * np.log10(r**2 / (1 - r**2))


def write_export(folder: Path, rate: int = RATE) -> nn.Module:
    torch.manual_seed(seeding.torch_seed(0, "weights"))
    model = slots.build("model", MODEL)
    folder.mkdir()
    safetensors.torch.save_file(model.state_dict(), str(folder / "model.safetensors"))
    (folder / "model.yaml").write_text(yaml.safe_dump({"model": MODEL, "sample_rate": rate}))
    (folder / "lineage.json").write_text(json.dumps({"run": "toy", "step": 12}))
    return model


def stranger(folder: Path, card: Any) -> Path:
    """An export with sound weights and the model.yaml `card`."""
    write_export(folder)
    if isinstance(card, dict):
        card = yaml.safe_dump({"sample_rate": 8000} | card)
    data = card if isinstance(card, bytes) else card.encode()
    (folder / "model.yaml").write_bytes(data)
    return folder


def damage(url: str, key: str, member: str = "s1") -> None:
    """Flip a byte in the middle of a member of a stored sample."""
    for path in (Path(url) / "index").glob("*[0-9].json"):
        for sample in json.loads(path.read_text())["samples"]:
            if sample["key"] == key:
                offset, size = sample["members"][member]
                with open(Path(url) / path.with_suffix(".tar").name, "r+b") as file:
                    file.seek(offset + size // 2)
                    [byte] = file.read(1)
                    file.seek(offset + size // 2)
                    file.write(bytes([byte ^ 0xFF]))
