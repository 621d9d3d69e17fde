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
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from sepdist import slots

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


def _linear(state: State, theirs: str, ours: str) -> dict[str, Tensor]:
    """Convert a 1x1 convolution or a linear layer, [out, in, ...], to a linear layer."""
    found = {
        kind: state[f"{theirs}.{kind}"]
        for kind in ("weight", "bias")
        if f"{theirs}.{kind}" in state
    }
    return {
        f"{ours}.{kind}": tensor.flatten(1) if kind == "weight" else tensor
        for kind, tensor in found.items()
    }


def _norm(state: State, theirs: str, ours: str) -> dict[str, Tensor]:
    return {f"{ours}.gain": state[f"{theirs}.gamma"], f"{ours}.shift": state[f"{theirs}.beta"]}


def _lstm(state: State, theirs: str, ours: str) -> dict[str, Tensor]:
    return {
        f"{ours}.{name}_l0{way}": state[f"{theirs}.{name}_l0{way}"]
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        for way in ("", "_reverse")
    }


def _codec(state: State) -> dict[str, Tensor]:
    encoder, decoder = (
        state[f"{kind}.filterbank._filters"][:, 0] for kind in ("encoder", "decoder")
    )
    return {"encoder.weight": encoder, "decoder.weight": decoder.T}


def _gated_head(state: State) -> dict[str, Tensor]:
    """The layers after the blocks of DPRNN and DPTNet."""
    halves = [_linear(state, f"masker.{kind}.0", "gate.linear") for kind in ("net_out", "net_gate")]
    return {
        "prelu.weight": state["masker.first_out.0.weight"],
        **_linear(state, "masker.first_out.1", "mask_conv"),
        **{name: torch.cat([half[name] for half in halves]) for name in halves[0]},
    }


def _count(state: State, prefix: str) -> int:
    """The number of blocks whose names begin with `prefix` and a number."""
    return 1 + max(
        int(name[len(prefix) :].split(".")[0]) for name in state if name.startswith(prefix)
    )


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


def _conv_tasnet_weights(state: State) -> dict[str, Tensor]:
    weights = _codec(state) | _norm(state, "masker.bottleneck.0", "bottleneck")
    weights |= _linear(state, "masker.bottleneck.1", "bottleneck") | _linear(
        state, "masker.mask_net.1", "mask_conv"
    )
    weights["prelu.weight"] = state["masker.mask_net.0.weight"]
    for index in range(_count(state, "masker.TCN.")):
        block, ours = f"masker.TCN.{index}.", f"blocks.{index}."
        shared = block + "shared_block."
        for norm, number in (("2", "1"), ("5", "2")):
            weights[f"{ours}gain{number}"] = state[f"{shared}{norm}.gamma"]
            weights[f"{ours}shift{number}"] = state[f"{shared}{norm}.beta"]
            weights[f"{ours}prelu{number}"] = state[f"{shared}{int(norm) - 1}.weight"]
        weights[f"{ours}in_weight"] = state[f"{shared}0.weight"].flatten(1)
        weights[f"{ours}in_bias"] = state[f"{shared}0.bias"]
        weights[f"{ours}taps"] = state[f"{shared}3.weight"][:, 0].T
        weights[f"{ours}taps_bias"] = state[f"{shared}3.bias"]
        for kind in ("weight", "bias"):
            both = torch.cat([state[f"{block}{conv}.{kind}"] for conv in ("res_conv", "skip_conv")])
            weights[f"{ours}out_{kind}"] = both.flatten(1) if kind == "weight" else both
    return weights


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


def _dprnn_weights(state: State) -> dict[str, Tensor]:
    weights = _codec(state) | _norm(state, "masker.bottleneck.0", "norm")
    weights |= _linear(state, "masker.bottleneck.1", "bottleneck") | _linear(
        state, "masker.mask_net", "mask"
    )
    for index in range(_count(state, "masker.net.")):
        for path in ("intra", "inter"):
            theirs, ours = f"masker.net.{index}.{path}_", f"{path}.{index}."
            weights |= _lstm(state, f"{theirs}RNN.rnn", f"{ours}lstm") | _norm(
                state, f"{theirs}norm", f"{ours}norm"
            )
            weights |= _linear(state, f"{theirs}linear", f"{ours}linear")
    return weights | _gated_head(state)


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


def _dptnet_weights(state: State) -> dict[str, Tensor]:
    weights = _codec(state) | _norm(state, "masker.in_norm", "norm")
    for index in range(_count(state, "masker.layers.")):
        for number, path in enumerate(("intra", "inter")):
            theirs, ours = f"masker.layers.{index}.{number}.", f"{path}.{index}."
            weights |= {
                f"{ours}attention.qkv.{kind}": state[f"{theirs}mha.in_proj_{kind}"]
                for kind in ("weight", "bias")
            }
            weights |= _linear(state, f"{theirs}mha.out_proj", f"{ours}attention.out")
            weights |= _lstm(state, f"{theirs}recurrent", f"{ours}lstm")
            weights |= _linear(state, f"{theirs}linear", f"{ours}linear")
            weights |= _norm(state, f"{theirs}norm_mha", f"{ours}attention_norm")
            weights |= _norm(state, f"{theirs}norm_ff", f"{ours}norm")
    return weights | _gated_head(state)


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


def _sepformer_weights(state: State) -> dict[str, Tensor]:
    halves = [
        _linear(state, f"masknet.{kind}.0", "gate.linear") for kind in ("output", "output_gate")
    ]
    weights = {
        "encoder.weight": state["encoder.conv1d.weight"][:, 0],
        "decoder.weight": state["decoder.weight"][:, 0].T,
        "prelu.weight": state["masknet.prelu.weight"],
        **{name: torch.cat([half[name] for half in halves]) for name in halves[0]},
        **_linear(state, "masknet.conv1d", "bottleneck"),
        **_linear(state, "masknet.conv2d", "mask_conv"),
        **_linear(state, "masknet.end_conv1x1", "mask_out"),
    }
    norms = {"masknet.norm": "norm"}
    layer_names = {
        "self_att.att.out_proj": "attention.out",
        "pos_ffn.ffn.0": "up",
        "pos_ffn.ffn.3": "down",
    }
    for index in range(_count(state, "masknet.dual_mdl.")):
        for path in ("intra", "inter"):
            theirs, ours = f"masknet.dual_mdl.{index}.{path}_", f"{path}.{index}."
            norms[f"{theirs}norm"] = f"{ours}global_norm"
            plain_norms = {f"{theirs}mdl.mdl.norm.norm": f"{ours}layer_norm"}
            for layer in range(_count(state, f"{theirs}mdl.mdl.layers.")):
                their_layer, our_layer = (
                    f"{theirs}mdl.mdl.layers.{layer}.",
                    f"{ours}layers.{layer}.",
                )
                for their_name, our_name in layer_names.items():
                    weights |= _linear(state, their_layer + their_name, our_layer + our_name)
                for kind in ("weight", "bias"):
                    name = f"{our_layer}attention.qkv.{kind}"
                    weights[name] = state[f"{their_layer}self_att.att.in_proj_{kind}"]
                plain_norms[f"{their_layer}norm1.norm"] = f"{our_layer}attention_norm"
                plain_norms[f"{their_layer}norm2.norm"] = f"{our_layer}norm"
            for their_name, our_name in plain_norms.items():
                weights |= {
                    f"{our_name}.{kind}": state[f"{their_name}.{kind}"]
                    for kind in ("weight", "bias")
                }
    for their_name, our_name in norms.items():
        weights |= {
            f"{our_name}.gain": state[f"{their_name}.weight"],
            f"{our_name}.shift": state[f"{their_name}.bias"],
        }
    return weights


ASTEROID = "asteroid asteroid-filterbanks"
SPEECHBRAIN = "speechbrain hyperpyyaml ruamel.yaml sentencepiece joblib torchaudio"
PEERS: dict[str, Peer] = {
    "conv_tasnet": Peer(ASTEROID, _conv_tasnet, _conv_tasnet_weights),
    "dprnn": Peer(ASTEROID, _dprnn, _dprnn_weights),
    "dptnet": Peer(ASTEROID, _dptnet, _dptnet_weights),
    "sepformer": Peer(SPEECHBRAIN, _sepformer, _sepformer_weights),
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
