"""A traced model gives the estimates of the model, at lengths that it was not traced with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sepdist.inference.tracing import TraceError, least_samples, save, trace, write
from sepdist.models.conv_tasnet import ConvTasNet
from sepdist.models.dprnn import DPRNN
from sepdist.models.dptnet import DPTNet
from sepdist.models.sandglasset import Sandglasset
from sepdist.models.sepformer import SepFormer
from sepdist.models.tf_gridnet import TFGridNet
from sepdist.models.tf_locoformer import TFLocoformer
from sepdist.objectives.contract import speakers_of
from tests.support.exports import write_export

CODEC = {"num_filters": 16, "kernel_size": 8, "stride": 4}
SPECTRA = {"fft_size": 16, "stride": 8, "num_layers": 1, "num_features": 12, "num_hidden": 10}
TCN = {"num_bottleneck": 8, "num_hidden": 12, "num_skip": 8, "num_blocks": 2, "num_repeats": 1}
SMALL: list[tuple[type[nn.Module], dict[str, Any]]] = [  # add a model and its sizes here
    (ConvTasNet, TCN),
    (ConvTasNet, TCN | {"padding": "both", "mask_activation": "sigmoid"}),
    (DPRNN, {"num_bottleneck": 8, "num_hidden": 8, "chunk_size": 10, "num_repeats": 1}),
    (DPTNet, {"num_hidden": 8, "chunk_size": 10, "num_repeats": 1, "padding": "none"}),
    (
        SepFormer,
        {"num_heads": 4, "num_hidden": 8, "chunk_size": 10, "num_blocks": 1, "num_layers": 1},
    ),
    (
        Sandglasset,
        {"num_features": 8, "num_hidden": 8, "num_heads": 2, "num_blocks": 3, "chunk_size": 16},
    ),
    (ConvTasNet, TCN | {"causal": True}),
    (TFGridNet, SPECTRA | {"num_heads": 3, "num_keys": 20}),
    (TFGridNet, SPECTRA | {"num_heads": 3, "num_keys": 20, "kernel_stride": 4}),
    (TFLocoformer, SPECTRA | {"num_heads": 3}),
    (TFLocoformer, SPECTRA | {"num_heads": 3, "kernel_size": 8, "kernel_stride": 4}),
]


def reader(path: Path) -> Callable[[Tensor], Tensor]:
    if path.suffix == ".pt2":
        return torch.export.load(str(path)).module()
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path))
    return lambda mixture: torch.from_numpy(session.run(None, {"mixture": mixture.numpy()})[0])


def same(model: nn.Module, run: Callable[[Tensor], Tensor]) -> None:
    least = least_samples(model)
    with torch.no_grad():
        for size, length in ((1, least), (2, least + 1), (3, least + 3), (1, 997), (2, 4002)):
            mixture = torch.randn(size, length)
            expected, got = model(mixture), run(mixture)
            assert float((got - expected).norm() / expected.norm()) < 1e-5, length


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize(("model", "sizes"), SMALL)
def test_a_traced_model_gives_its_estimates_at_other_lengths(
    model: type[nn.Module], sizes: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    eager = model(**(sizes if "fft_size" in sizes else CODEC | sizes)).eval()
    path = tmp_path / ("model.pt2" if kind == "torch" else "model.onnx")
    save(trace(eager), str(path), kind, {"sample_rate": 8000})
    same(eager, reader(path))


def test_a_model_is_written_as_one_file_that_gives_its_estimates(tmp_path: Path) -> None:
    eager = write_export(tmp_path / "export").eval()
    path = tmp_path / "a b" / "model.pt2"
    path.parent.mkdir()
    facts = write(str(tmp_path / "export"), str(path), "torch")
    assert facts == {"sample_rate": 8000, "min_samples": 16 + 2 * 8}
    same(eager, reader(path))
    with pytest.raises(FileExistsError, match=r"model\.pt2 holds something"):
        write(str(tmp_path / "export"), str(path), "torch")
    with pytest.raises(TraceError, match=r"ends in \.onnx"):
        write(str(tmp_path / "export"), str(tmp_path / "model.pt2"), "onnx")


def test_a_missing_library_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TraceError, match=r"pip install onnx onnxscript .*`onnx`"):
        write("anything", str(tmp_path / "model.onnx"), "onnx")


class Branching(nn.Module):
    def forward(self, mixture_BT: Tensor) -> Tensor:
        return mixture_BT[:, None] if float(mixture_BT.sum()) > 0 else -mixture_BT[:, None]


def test_a_model_that_cannot_be_traced_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_export(tmp_path / "export")
    broken = lambda model: trace(Branching())  # noqa: E731
    monkeypatch.setattr("sepdist.inference.tracing.trace", broken)
    with pytest.raises(TraceError, match="ConvTasNet cannot be written as torch: "):
        write(str(tmp_path / "export"), str(tmp_path / "model.pt2"), "torch")
    assert not (tmp_path / "model.pt2").exists()


@pytest.mark.parametrize("change", [{"stride": 8}, {"num_speakers": 4}])
def test_frames_side_by_side_and_the_loudest_outputs_are_traced(change: dict[str, int]) -> None:
    model = ConvTasNet(**(CODEC | TCN | change)).eval()
    if "num_speakers" in change:
        model.register_forward_hook(lambda _, __, waves: speakers_of(waves, num_loudest=2))
    same(model, trace(model).module())


@pytest.mark.slow
def test_the_loudest_outputs_are_chosen_in_onnx_too(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model = ConvTasNet(**(CODEC | TCN | {"num_speakers": 4})).eval()
    model.register_forward_hook(lambda _, __, waves: speakers_of(waves, num_loudest=2))
    save(trace(model), str(tmp_path / "model.onnx"), "onnx", {"sample_rate": 8000})
    same(model, reader(tmp_path / "model.onnx"))


class Hidden(nn.Module):
    def forward(self, mixture_BT: Tensor) -> Tensor:
        return mixture_BT.sort(dim=-1, stable=True).values[:, None]


def test_what_onnx_cannot_say_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    write_export(tmp_path / "export")
    monkeypatch.setattr("sepdist.inference.tracing.trace", lambda model: trace(Hidden()))
    with pytest.raises(TraceError, match=r"cannot be written as onnx: No ONNX.*aten\.sort"):
        write(str(tmp_path / "export"), str(tmp_path / "model.onnx"), "onnx")
