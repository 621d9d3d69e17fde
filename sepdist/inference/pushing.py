"""Give a model away: its export with a model card, in a folder, in object storage or on the hub."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import yaml

from sepdist import hub, storage
from sepdist.config import ConfigError
from sepdist.inference.export import Export, check_new, load_export
from sepdist.reporting import to_json
from sepdist.training.handoff import read_export

USE = """```python
import sepdist, soundfile  # with huggingface_hub, the extra `hub`

separator = sepdist.load("{url}")
wave, sample_rate = soundfile.read("mixture.wav")
voices = separator(wave, sample_rate)  # [T] in, [S, T] out, at the same rate
```
"""


def push(
    model: str,
    target: str,
    licence: str,
    results: str,
    private: bool,
    update: bool,
    half: bool = False,
) -> str:
    """Put `model` with a card into the new folder `target` or on the hub; returns its address.

    `results` is "" or a results.json of `sepdist evaluate`, of the same weights. With `half` they
    are rounded to float16, which loads as float32.
    """
    if not hub.is_hub(target):
        check_new(target)
    export = load_export(model)  # which refuses what nobody could load
    weights, config, lineage, _ = read_export(export.url)
    scores = read_results(results, lineage) if results else {}
    if half:
        weights = {k: one.half() if one.is_floating_point() else one for k, one in weights.items()}
    files = {
        "model.safetensors": safetensors.torch.save(weights),
        "model.yaml": yaml.safe_dump(config, sort_keys=False).encode(),
        "lineage.json": to_json(without_places(lineage), indent=1).encode(),
        "README.md": model_card(export, target, licence, scores).encode(),
    }
    if not hub.is_hub(target):
        for name, content in files.items():
            storage.put_bytes(storage.join(target, name), content)
        return target
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        return hub.upload(Path(folder), target, private, update)


def read_results(url: str, lineage: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a results.json; ConfigError if it is damaged or of other weights."""
    try:
        scores: dict[str, Any] = json.loads(storage.read_bytes(url))
        weights = scores["model"]["lineage"].get("sha256")
        [one["mean"] + 0.0 for one in scores["metrics_db"].values()]
        str(scores["data"]["corpus"] + scores["data"]["split"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{url}: it is no results.json of `sepdist evaluate`") from error
    if weights is None or weights != lineage.get("sha256"):
        raise ConfigError(f"{url}: its scores are of other weights; evaluate this model first")
    return scores


def without_places(lineage: Any) -> Any:
    """A lineage without paths of the machine that trained the model."""
    if not isinstance(lineage, Mapping):
        return lineage
    kept = {key: one for key, one in lineage.items() if key not in ("run_dir", "url")}
    return {key: without_places(one) for key, one in kept.items()}


def model_card(export: Export, url: str, licence: str, scores: Mapping[str, Any]) -> str:
    """README.md with the front matter that the hub reads."""
    name, kind = url.rstrip("/").rpartition("/")[2].partition("@")[0], type(export.model).__name__
    front: dict[str, Any] = {"license": licence, "library_name": "sepdist"}
    front |= {"pipeline_tag": "audio-to-audio", "tags": ["speech-separation", kind.lower()]}
    size = sum(p.numel() for p in export.model.parameters())
    lines = [f"# {name}\n\n{kind} at {export.sample_rate} Hz, {size:,} parameters, {licence}.\n"]
    lines.append("## Use\n\n" + USE.format(url=url))
    if scores:
        data, values = scores["data"], scores["metrics_db"].items()
        test_set = f"{data['corpus']} {data['split']}"
        metrics = [{"type": key, "value": round(one["mean"], 2)} for key, one in values]
        task = {"type": "audio-to-audio", "name": "speech separation"}
        result = {"task": task, "dataset": {"name": test_set, "type": data["corpus"]}}
        front["model-index"] = [{"name": name, "results": [result | {"metrics": metrics}]}]
        noisy = ", with noise" if data.get("noise") else ""
        lines.append(f"## Scores\n\nMeans of {scores.get('num_utterances')} mixtures of {test_set}")
        lines[-1] += f"{noisy}, in dB:\n\n| score | dB |\n|---|---|"
        lines += [*(f"| {key} | {one['mean']:.2f} |" for key, one in values), ""]
    lines.append("## Origin\n")
    stage: Any = export.lineage
    while isinstance(stage, Mapping) and stage:
        lines.append(f"- run {stage.get('run')}, step {stage.get('step')}")
        stage = stage.get("parent")
    return "\n".join(["---", yaml.safe_dump(front, sort_keys=False) + "---\n", *lines, ""])
