"""Published implementations to compare our models with, and their weights as ours.

The benchmarks of models, evaluation and separation and tests/models/test_peers.py use this module;
the tests skip peers that are not installed. A peer follows our models' contract, mixture [B, T] to
estimates [B, S, T].
"""

import importlib.machinery
import json
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from sepdist import slots
from sepdist.inference.importing import RULES, convert

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Peer:
    """A published model.

    `build` takes our model's arguments by name and raises ImportError if `packages` are missing;
    `weights` converts the peer's state_dict to our model's.
    """

    packages: str
    build: Callable[[Mapping[str, Any]], nn.Module]
    weights: Callable[[State], dict[str, Tensor]]


def _conv_tasnet(sizes: Mapping[str, Any]) -> nn.Module:
    from asteroid.models import ConvTasNet

    return ConvTasNet(
        n_src=sizes["num_speakers"],
        n_filters=sizes["num_filters"],
        kernel_size=sizes["kernel_size"],
        stride=sizes["stride"],
        bn_chan=sizes["num_bottleneck"],
        hid_chan=sizes["num_hidden"],
        skip_chan=sizes["num_skip"],
        conv_kernel_size=sizes["num_taps"],
        n_blocks=sizes["num_blocks"],
        n_repeats=sizes["num_repeats"],
        mask_act="relu",
    )


def _dprnn(sizes: Mapping[str, Any]) -> nn.Module:
    from asteroid.models import DPRNNTasNet

    return DPRNNTasNet(
        n_src=sizes["num_speakers"],
        n_filters=sizes["num_filters"],
        kernel_size=sizes["kernel_size"],
        stride=sizes["stride"],
        bn_chan=sizes["num_bottleneck"],
        hid_size=sizes["num_hidden"],
        chunk_size=sizes["chunk_size"],
        n_repeats=sizes["num_repeats"],
        mask_act="relu",
    )


def _dptnet(sizes: Mapping[str, Any]) -> nn.Module:
    from asteroid.models import DPTNet

    return DPTNet(
        n_src=sizes["num_speakers"],
        n_filters=sizes["num_filters"],
        kernel_size=sizes["kernel_size"],
        stride=sizes["stride"],
        n_heads=sizes["num_heads"],
        ff_hid=sizes["num_hidden"],
        chunk_size=sizes["chunk_size"],
        n_repeats=sizes["num_repeats"],
    )


def stand_in_for_torchaudio() -> None:
    """Let SpeechBrain be imported where torchaudio cannot be loaded, as in a CPU build of PyTorch.

    The models, and separating files at the model's own rate, use nothing of it.
    """
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        stub = types.ModuleType("torchaudio")
        stub.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
        stub.__version__ = "2.11.0"  # type: ignore[attr-defined]
        sys.modules["torchaudio"] = stub


def _sepformer(sizes: Mapping[str, Any]) -> nn.Module:
    stand_in_for_torchaudio()
    from speechbrain.lobes.models.dual_path import SepformerWrapper

    if sizes["kernel_size"] != 2 * sizes["stride"]:
        raise ValueError("SpeechBrain's stride is half its kernel")

    class Transposed(SepformerWrapper):
        def forward(self, mix: Tensor) -> Tensor:
            return super().forward(mix).transpose(1, 2)

    both = {"numlayers": "num_layers", "nhead": "num_heads", "dffn": "num_hidden"}
    peer = Transposed(
        encoder_kernel_size=sizes["kernel_size"],
        encoder_out_nchannels=sizes["num_filters"],
        masknet_chunksize=sizes["chunk_size"],
        masknet_numlayers=sizes["num_blocks"],
        masknet_numspks=sizes["num_speakers"],
        **{
            f"{path}_{theirs}": sizes[ours]
            for path in ("intra", "inter")
            for theirs, ours in both.items()
        },
    )
    for module in peer.modules():  # as in its recipes; the constructor has no argument for it
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return peer


ASTEROID = "asteroid asteroid-filterbanks"
SPEECHBRAIN = "speechbrain hyperpyyaml ruamel.yaml sentencepiece joblib torchaudio"
PEERS: dict[str, Peer] = {
    "conv_tasnet": Peer(ASTEROID, _conv_tasnet, partial(convert, table=RULES["conv_tasnet"])),
    "dprnn": Peer(ASTEROID, _dprnn, partial(convert, table=RULES["dprnn"])),
    "dptnet": Peer(ASTEROID, _dptnet, partial(convert, table=RULES["dptnet"])),
    "sepformer": Peer(SPEECHBRAIN, _sepformer, partial(convert, table=RULES["sepformer"])),
}


CONFIGS = Path(__file__).parent.parent / "configs" / "model"


def export_with_peer(
    preset: str, folder: Path, peer_wanted: bool = True, **sizes: Any
) -> nn.Module | None:
    """Write an export of a file of configs/model; returns the peer with the same weights.

    ImportError if the peer's packages are missing. Without a peer the weights are random.
    """
    node = yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text()) | {"num_speakers": 2} | sizes
    torch.manual_seed(0)
    ours, peer = slots.build("model", node), None
    if peer_wanted:
        known = PEERS[node["_target_"].split(".")[-2]]
        peer = known.build(node).eval()
        ours.load_state_dict(known.weights(peer.state_dict()))
    folder.mkdir(parents=True)
    safetensors.torch.save_file(ours.state_dict(), str(folder / "model.safetensors"))
    (folder / "model.yaml").write_text(yaml.safe_dump({"model": node, "sample_rate": 8000}))
    (folder / "lineage.json").write_text(json.dumps({"run": "benchmark", "step": 0}))
    return peer
