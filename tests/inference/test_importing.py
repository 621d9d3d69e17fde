"""Imported models give the estimates of the original code, at lengths that are no whole frames too.

The originals are the packages, where they are installed, and Conv-TasNet written out with plain
convolutions.
"""

import importlib
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from benchmarks.peers import stand_in_for_torchaudio
from sepdist import cli
from sepdist.inference.export import load_separator
from sepdist.inference.importing import import_model
from sepdist.training.checkpoint import CheckpointError

LENGTHS = (9, 12, 251, 1003)  # frames of 8 samples every 4
CODEC = {"n_src": 3, "n_filters": 24, "kernel_size": 8, "stride": 4}
TCN = {"in_chan": 24, "out_chan": 24, "bn_chan": 12, "hid_chan": 20, "skip_chan": 8}
TCN |= {"conv_kernel_size": 3, "n_blocks": 3, "n_repeats": 2, "norm_type": "gLN", "causal": False}
TCN |= {"fb_name": "FreeFB", "sample_rate": 8000, "mask_act": "sigmoid", "encoder_activation": None}
ARGS: dict[str, Any] = CODEC | TCN
ASTEROID: dict[str, dict[str, Any]] = {
    "ConvTasNet": {"bn_chan": 12, "hid_chan": 20, "skip_chan": 8, "n_blocks": 3, "n_repeats": 2},
    "DPRNNTasNet": {"bn_chan": 16, "hid_size": 8, "chunk_size": 10, "n_repeats": 2},
    "DPTNet": {"n_heads": 4, "ff_hid": 8, "chunk_size": 10, "n_repeats": 2},
}


def shaken(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def same_estimates(folder: Path, original: Callable[[Tensor], Tensor]) -> None:
    ours = load_separator(str(folder)).model
    for module in ours.modules():
        if hasattr(module, "compiled"):
            module.compiled = False  # type: ignore[assignment]
    torch.manual_seed(2)
    for length in LENGTHS:
        mixture = torch.randn(2, length)
        with torch.no_grad():
            expected, got = original(mixture), ours(mixture)
        assert got.shape == expected.shape
        assert float((got - expected).norm() / expected.norm()) < 2e-5, length


@pytest.mark.parametrize("name", ASTEROID)
@pytest.mark.parametrize("mask_act", ["relu", "sigmoid"])
def test_a_model_saved_by_asteroid_gives_its_estimates(
    name: str, mask_act: str, tmp_path: Path
) -> None:
    models = pytest.importorskip("asteroid.models")
    model = shaken(getattr(models, name)(**CODEC, **ASTEROID[name], mask_act=mask_act))
    saved = {"model_name": name, "model_args": model.get_model_args()}
    saved["infos"] = {"software_versions": {"torch_version": torch.__version__}}
    torch.save(saved | {"state_dict": model.state_dict()}, tmp_path / "best.pth")
    import_model("asteroid", str(tmp_path / "best.pth"), str(tmp_path / "out"), {})
    same_estimates(tmp_path / "out", model)


HYPERPARAMS = """
sample_rate: 8000
num_spks: 3
width: 24
Encoder: !new:speechbrain.lobes.models.dual_path.Encoder
    kernel_size: 8
    out_channels: !ref <width>
intra: !new:speechbrain.lobes.models.dual_path.SBTransformerBlock
    num_layers: 2
    d_model: 24
    nhead: 4
    d_ffn: 20
    dropout: 0
    use_positional_encoding: true
    norm_before: true
MaskNet: !new:speechbrain.lobes.models.dual_path.Dual_Path_Model
    num_spks: !ref <num_spks>
    in_channels: 24
    out_channels: 24
    num_layers: 2
    K: 10
    intra_model: !ref <intra>
    inter_model: !ref <intra>
    norm: ln
    linear_layer_after_inter_intra: false
    skip_around_intra: true
Decoder: !new:speechbrain.lobes.models.dual_path.Decoder
    in_channels: 24
    out_channels: 1
    kernel_size: 8
    stride: 4
    bias: false
modules:
    encoder: !ref <Encoder>
    decoder: !ref <Decoder>
    masknet: !ref <MaskNet>
evil: !apply:os.system ["touch evil"]
"""


def test_a_folder_of_speechbrain_gives_its_estimates(tmp_path: Path) -> None:
    stand_in_for_torchaudio()
    module = pytest.importorskip("speechbrain.lobes.models.dual_path")
    sizes = {f"{one}_numlayers": 2 for one in ("intra", "inter")}
    sizes |= {f"{one}_nhead": 4 for one in ("intra", "inter")}
    sizes |= {f"{one}_dffn": 20 for one in ("intra", "inter")}
    sizes |= {"encoder_kernel_size": 8, "encoder_out_nchannels": 24, "masknet_chunksize": 10}
    model = shaken(module.SepformerWrapper(**sizes, masknet_numlayers=2, masknet_numspks=3))
    (tmp_path / "hyperparams.yaml").write_text(HYPERPARAMS)
    for name in ("encoder", "masknet", "decoder"):
        torch.save(getattr(model, name).state_dict(), tmp_path / f"{name}.ckpt")
    import_model("speechbrain", str(tmp_path), str(tmp_path / "out"), {})
    same_estimates(tmp_path / "out", lambda mixture: model(mixture).transpose(1, 2))
    assert not (Path.cwd() / "evil").exists()


def conv_tasnet(repeats: int, layers: int, kernel: int) -> tuple[dict[str, Tensor], Callable]:
    """The state_dict of torchaudio's ConvTasNet, and the model by plain convolutions."""
    torch.manual_seed(3)
    f, b, h, s, stride = 16, 12, 20, 2, kernel // 2
    top = "mask_generator."
    shapes: dict[str, tuple[int, ...]] = {"encoder.weight": (f, 1, kernel)}
    shapes |= {"decoder.weight": (f, 1, kernel), f"{top}output_prelu.weight": (1,)}
    shapes |= {f"{top}input_norm.weight": (f,), f"{top}input_norm.bias": (f,)}
    shapes |= {f"{top}input_conv.weight": (b, f, 1), f"{top}input_conv.bias": (b,)}
    shapes |= {f"{top}output_conv.weight": (f * s, b, 1), f"{top}output_conv.bias": (f * s,)}
    for n in range(repeats * layers):
        one = f"{top}conv_layers.{n}."
        inner = {"0.weight": (h, b, 1), "0.bias": (h,), "1.weight": (1,), "2.weight": (h,)}
        inner |= {"2.bias": (h,), "3.weight": (h, 1, 3), "3.bias": (h,), "4.weight": (1,)}
        inner |= {"5.weight": (h,), "5.bias": (h,)}
        shapes |= {f"{one}conv_layers.{name}": shape for name, shape in inner.items()}
        for out in ("skip_out", "res_out")[: 1 + (n < repeats * layers - 1)]:
            shapes |= {f"{one}{out}.weight": (b, h, 1), f"{one}{out}.bias": (b,)}
    state = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}

    def run(mixture: Tensor) -> Tensor:
        odd, length = kernel % 2, mixture.shape[1]
        padded = F.pad(mixture, (0, -(length - odd) % stride))[:, None]
        encoded = F.conv1d(padded, state["encoder.weight"], stride=stride, padding=stride)

        def norm(x: Tensor, name: str) -> Tensor:
            return F.group_norm(x, 1, state[f"{name}.weight"], state[f"{name}.bias"], 1e-8)

        def conv(x: Tensor, name: str, **more: int) -> Tensor:
            return F.conv1d(x, state[f"{name}.weight"], state[f"{name}.bias"], **more)

        x, total = conv(norm(encoded, f"{top}input_norm"), f"{top}input_conv"), torch.zeros(())
        for n in range(repeats * layers):
            one, step = f"{top}conv_layers.{n}.", 2 ** (n % layers)
            y = F.prelu(conv(x, f"{one}conv_layers.0"), state[f"{one}conv_layers.1.weight"])
            y = conv(
                norm(y, f"{one}conv_layers.2"),
                f"{one}conv_layers.3",
                padding=step,
                dilation=step,
                groups=h,
            )
            y = norm(F.prelu(y, state[f"{one}conv_layers.4.weight"]), f"{one}conv_layers.5")
            total = total + conv(y, f"{one}skip_out")
            x = x + conv(y, f"{one}res_out") if f"{one}res_out.weight" in state else x
        masks = conv(F.prelu(total, state[f"{top}output_prelu.weight"]), f"{top}output_conv")
        masked = torch.sigmoid(masks).unflatten(1, (s, f)) * encoded[:, None]
        waves = F.conv_transpose1d(
            masked.flatten(0, 1), state["decoder.weight"], stride=stride, padding=stride
        )
        return waves.view(len(mixture), s, -1)[..., :length]

    return state, run


@pytest.mark.parametrize("kernel", [8, 9])
def test_a_state_dict_of_torchaudio_gives_its_estimates(kernel: int, tmp_path: Path) -> None:
    state, original = conv_tasnet(2, 3, kernel)
    torch.save(state, tmp_path / "model.pt")
    given = {"num_repeats": 2, "mask_activation": "sigmoid", "sample_rate": 8000}
    source = str(tmp_path / "model.pt")
    import_model("torchaudio", source, str(tmp_path / "out"), given)
    same_estimates(tmp_path / "out", original)
    for missing in given:
        rest = {key: value for key, value in given.items() if key != missing}
        with pytest.raises(CheckpointError, match=f"does not tell .*{missing}"):
            import_model("torchaudio", source, str(tmp_path / "other"), rest)
    with pytest.raises(FileExistsError, match="out holds something"):
        import_model("torchaudio", source, str(tmp_path / "out"), given)
    with pytest.raises(CheckpointError, match="num_repeats=4 does not divide the 6 blocks"):
        import_model("torchaudio", source, str(tmp_path / "other"), given | {"num_repeats": 4})
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_type": "cLN"}, "norm_type='cLN'"),
        ({"causal": True}, "causal=True"),
        ({"mask_act": "softmax"}, "mask_act='softmax'"),
        ({"encoder_activation": "relu"}, "encoder_activation='relu'"),
        ({"fb_name": "STFTFB"}, "fb_name='STFTFB'"),
        ({"skip_chan": 0}, "skip_chan=0"),
        ({"out_chan": 12}, "out_chan=12"),
        ({"gating": "novel"}, "gating='novel'"),
        ({"bn_chan": [1, 2]}, r"bn_chan=\[1, 2\]"),
        ({"n_blocks": 10**9}, "num_blocks=1000000000 is not between"),
        ({}, "missing blocks.0.gain1"),
        ({"n_filters": None, "in_chan": None, "out_chan": None}, "does not tell num_filters"),
        ({"sample_rate": None}, "does not tell sample_rate"),
    ],
)
def test_what_cannot_be_mapped_is_refused_by_key_and_value(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved = {"model_name": "ConvTasNet", "model_args": ARGS | change, "state_dict": {}}
    torch.save(saved, tmp_path / "best.pth")
    with pytest.raises(CheckpointError, match=message):
        import_model("asteroid", str(tmp_path / "best.pth"), str(tmp_path / "out"), {})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("origin", "saved", "message"),
    [
        ("asteroid", {"model_name": ["x"], "model_args": ARGS, "state_dict": {}}, r"\['x'\]"),
        (
            "asteroid",
            {"model_name": "ConvTasNet", "model_args": ARGS, "state_dict": {1: torch.ones(2)}},
            "1 is no name of a parameter",
        ),
        ("torchaudio", {"encoder.weight": torch.ones(2, 1, 4), 7: torch.ones(2)}, "7 is no name"),
        ("torchaudio", {"encoder.bias": torch.tensor(1.0)}, "'encoder.bias' is no name"),
    ],
)
def test_odd_names_and_tensors_of_a_checkpoint_are_refused_by_name(
    origin: str, saved: dict[Any, Any], message: str, tmp_path: Path
) -> None:
    torch.save(saved, tmp_path / "best.pth")
    with pytest.raises(CheckpointError, match=message):
        import_model(origin, str(tmp_path / "best.pth"), str(tmp_path / "out"), {})


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("norm_before: true", "norm_before: false", "norm_before=False"),
        ("    norm_before: true\n", "", "norm_before=False"),
        ("norm: ln", "norm: bn", "norm='bn'"),
        ("skip_around_intra: true", "skip_around_intra: false", "skip_around_intra=False"),
        ("stride: 4", "stride: 2", "stride=2"),
        ("SBTransformerBlock", "SBConformerEncoderBlock", "SBConformerEncoderBlock"),
        (
            "kernel_size: 8\n    out",
            "kernel_size: !ref <a> // 3\n    out",
            "value of !ref <a> // 3",
        ),
        ("    masknet: !ref <MaskNet>", "", "Dual_Path_Model is wanted"),
        ("width: 24", "width: &a [*a]", "alias"),
    ],
)
def test_another_network_of_speechbrain_is_refused_by_name(
    before: str, after: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "hyperparams.yaml").write_text(HYPERPARAMS.replace(before, after))
    with pytest.raises(CheckpointError, match=message):
        import_model("speechbrain", str(tmp_path), str(tmp_path / "out"), {})


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("open('evil', 'w')",)


def test_nothing_in_a_checkpoint_is_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model_name": Evil()}, tmp_path / "best.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "noise.pth").write_bytes(b"no checkpoint")
    for name in ("best", "raw", "noise"):
        for origin in ("asteroid", "torchaudio"):
            with pytest.raises(CheckpointError, match=f"{name}.pth.*tensors and plain values"):
                import_model(origin, str(tmp_path / f"{name}.pth"), "out", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pth", "noise.pth", "raw.pth"]


def test_the_verb_names_the_fault_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["import", "asteroid", str(tmp_path / "no such.pth"), "--output", str(tmp_path / "o")]
    monkeypatch.setattr(sys, "argv", ["sepdist", *words])
    with pytest.raises(SystemExit) as end:
        cli.run("import")
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.count("\n") == 1, error
    assert "no such.pth: no such file" in error


def test_an_imported_config_is_plain_and_complete(tmp_path: Path) -> None:
    state, _ = conv_tasnet(2, 3, 8)
    torch.save(state, tmp_path / "model.pt")
    given = {"num_repeats": 2, "mask_activation": "relu", "sample_rate": 8000}
    import_model("torchaudio", str(tmp_path / "model.pt"), str(tmp_path / "out"), given)
    card = yaml.safe_load((tmp_path / "out" / "model.yaml").read_text())
    module, _, name = card["model"].pop("_target_").rpartition(".")
    assert getattr(importlib.import_module(module), name)(**card["model"])
    assert (card["sample_rate"], card["model"]["padding"]) == (8000, "both")
