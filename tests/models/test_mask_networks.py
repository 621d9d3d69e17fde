"""Contract tests of most models: any length, sizes, bits, bf16, ZeRO-3 and silence."""

import inspect
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from sepdist.models.dprnn import DPRNN
from sepdist.models.dptnet import DPTNet
from sepdist.models.sandglasset import Sandglasset
from sepdist.models.sepformer import SepFormer
from sepdist.models.tf_gridnet import TFGridNet
from sepdist.models.tf_locoformer import TFLocoformer
from tests.support.model_checks import (
    depend_on_speakers,
    gradients,
    moved_differ,
    relative,
    shaken,
)

SIZES = {  # every size of a model is different from its others
    DPRNN: {"num_filters": 12, "num_bottleneck": 20, "num_hidden": 64, "chunk_size": 10},
    DPTNet: {"num_filters": 12, "num_heads": 3, "num_hidden": 64, "chunk_size": 10},
    SepFormer: {"num_filters": 24, "num_heads": 3, "num_hidden": 40, "chunk_size": 10},
    Sandglasset: {"num_filters": 14, "num_features": 12, "num_heads": 3, "num_hidden": 5},
}
SIZES[DPRNN] |= {"num_repeats": 2}
SIZES[DPTNet] |= {"num_repeats": 2}
SIZES[SepFormer] |= {"num_blocks": 2, "num_layers": 2}
SIZES[Sandglasset] |= {"num_blocks": 5, "chunk_size": 32, "dropout": 0.0}
DUAL_PATH = list(SIZES)
SIZES[TFLocoformer] = {"fft_size": 16, "num_layers": 1, "num_features": 12}
SIZES[TFLocoformer] |= {"num_heads": 3, "num_hidden": 10}
SIZES[TFGridNet] = {"fft_size": 16, "num_layers": 1, "num_features": 12, "num_heads": 3}
SIZES[TFGridNet] |= {"num_hidden": 5, "num_keys": 20}

each_model = pytest.mark.parametrize("kind", SIZES)


def small(kind: type[nn.Module], **changes: object) -> nn.Module:
    torch.manual_seed(0)
    return shaken(
        kind(**({"num_speakers": 3, "kernel_size": 6, "stride": 2} | SIZES[kind] | changes))
    )


@each_model
@pytest.mark.parametrize(("kernel_size", "stride"), [(2, 1), (16, 8), (10, 3), (5, 5)])
def test_the_estimates_are_as_long_as_the_mixture_at_any_length(
    kind: type[nn.Module], kernel_size: int, stride: int
) -> None:
    model = small(kind, kernel_size=kernel_size, stride=stride)
    for length in (model.min_length, model.min_length + 1, 97, 200):
        assert model(torch.randn(2, length)).shape == (2, 3, length)


@each_model
@pytest.mark.parametrize(
    ("shape", "words"),
    [((1, 5), r"\(1, 5\).*T >= {}"), ((100,), r"\(100,\)"), ((1, 2, 50), r"\(1, 2, 50\)")],
)
def test_a_mixture_of_another_shape_is_refused_with_it(
    kind: type[nn.Module], shape: tuple[int, ...], words: str
) -> None:
    least = 10 if "fft_size" in SIZES[kind] else 6  # half a window and a stride
    with pytest.raises(ValueError, match=words.format(least)):
        small(kind)(torch.zeros(shape))


@each_model
@pytest.mark.parametrize("change", [{"stride": 9}, {"chunk_size": 9}, {"num_speakers": 0}])
def test_sizes_that_cannot_work_are_refused_by_name(
    kind: type[nn.Module], change: dict[str, int]
) -> None:
    if kind not in DUAL_PATH and "chunk_size" in change:
        pytest.skip("a model without chunks")
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        small(kind, **change)


@each_model
@pytest.mark.parametrize("value", [0, -1])
def test_every_count_of_a_model_is_at_least_1(kind: type[nn.Module], value: int) -> None:
    counts = [name for name in inspect.signature(kind).parameters if name.startswith("num_")]
    for name in counts:
        with pytest.raises(ValueError, match=f"{name}={value}: choose at least 1"):
            small(kind, **{name: value})


@pytest.mark.parametrize("kind", [DPTNet, SepFormer, Sandglasset, TFLocoformer, TFGridNet])
def test_features_that_do_not_divide_among_the_heads_are_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"\d+ features .*num_heads=5"):
        small(kind, num_heads=5)


@each_model
def test_the_output_parameters_are_those_that_depend_on_the_number_of_speakers(
    kind: type[nn.Module],
) -> None:
    names = {name for name, _ in small(kind).named_parameters()}
    outputs = {name for name in names if name.startswith(kind.output_parameters)}
    assert depend_on_speakers(partial(small, kind)) == outputs != set()


@each_model
def test_a_silent_mixture_gives_finite_estimates_and_gradients(kind: type[nn.Module]) -> None:
    model = small(kind)
    model(torch.zeros(2, 100)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@each_model
def test_a_model_with_a_frozen_encoder_trains_the_rest_as_without(kind: type[nn.Module]) -> None:
    mixture, whole, frozen = torch.randn(2, 100), small(kind), small(kind)
    first, encoder = "encoder", getattr(frozen, "encoder", None)
    if kind not in DUAL_PATH:
        first, encoder = "spectra.conv", frozen.spectra.conv
    encoder.requires_grad_(False)
    for model in (whole, frozen):
        model(mixture).square().sum().backward()
    assert encoder.weight.grad is None
    others = [name for name, _ in frozen.named_parameters() if not name.startswith(first)]
    gradients = [{n: p.grad for n, p in m.named_parameters()} for m in (whole, frozen)]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in others)


@each_model
def test_where_the_parameters_lie_in_memory_changes_no_bit(kind: type[nn.Module]) -> None:
    assert moved_differ(small(kind), torch.randn(2, 120)) == []


@each_model
def test_two_runs_have_the_same_bits(kind: type[nn.Module]) -> None:
    mixture = torch.randn(2, 300)
    first, second = (gradients(small(kind), mixture) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_model
def test_bf16_autocast_gives_fp32_estimates_and_gradients_near_those_of_fp32(
    kind: type[nn.Module],
) -> None:
    model, mixture = small(kind), torch.randn(2, 400)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        estimates, got = model(mixture), gradients(model, mixture)
    flat, expected = (
        torch.cat([g.flatten() for g in grads]) for grads in (got, gradients(model, mixture))
    )
    assert estimates.dtype == flat.dtype == torch.float32
    assert relative(estimates, model(mixture)) < 0.05 and relative(flat, expected) < 0.1


BF16_STEPS = """
import torch
from sepdist.models.dprnn import DPRNN
from sepdist.models.dptnet import DPTNet
from sepdist.models.sandglasset import Sandglasset
from sepdist.models.tf_gridnet import TFGridNet

assert torch.backends.cpu.get_cpu_capability() != "AVX512"
sizes = {"kernel_size": 4, "stride": 2, "num_hidden": 6}
chunks = {"num_filters": 8, "chunk_size": 4}
for kind, more in (
    (DPRNN, chunks | {"num_repeats": 1}),
    (DPTNet, chunks | {"num_heads": 2, "num_repeats": 1}),
    (Sandglasset, chunks | {"num_heads": 2, "num_features": 8, "num_blocks": 3}),
    (TFGridNet, {"num_heads": 2, "num_features": 8, "num_layers": 1, "fft_size": 8}),
):
    model = kind(2, **sizes, **more)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(1, 40)).square().mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    print(kind.__name__)
"""


def test_every_model_with_an_lstm_trains_in_bf16_without_avx512() -> None:
    older = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", BF16_STEPS], env=os.environ | older, capture_output=True, text=True
    )
    assert done.stdout.split() == ["DPRNN", "DPTNet", "Sandglasset", "TFGridNet"], done.stderr


@each_model
def test_parameters_are_needed_only_while_their_own_module_runs(kind: type[nn.Module]) -> None:
    """As under ZeRO-3, which frees a module's own parameters before and after its forward."""
    model, mixture = small(kind), torch.randn(1, 60)
    with torch.no_grad():
        expected = model(mixture)
        for module in model.modules():
            kept = {name: p.data for name, p in module.named_parameters(recurse=False)}

            def gather(module: nn.Module, _: object, kept: dict[str, Tensor] = kept) -> None:
                for name, data in kept.items():
                    getattr(module, name).data = data

            def free(module: nn.Module, *_: object, kept: dict[str, Tensor] = kept) -> None:
                for name in kept:
                    getattr(module, name).data = torch.empty(0)

            free(module)
            module.register_forward_pre_hook(gather)
            module.register_forward_hook(free)
        assert torch.equal(model(mixture), expected)
