"""What the models do on a GPU, done on the CPU: the same estimates and gradients."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from torch import nn

from benchmarks import operations
from sepdist.models import compiling
from sepdist.models.conv_tasnet import ConvTasNet
from sepdist.models.dprnn import DPRNN
from sepdist.models.dptnet import DPTNet
from sepdist.models.dual_path import global_norm
from sepdist.models.sandglasset import Sandglasset
from sepdist.models.sepformer import SepFormer
from sepdist.models.tf_gridnet import TFGridNet
from sepdist.models.tf_locoformer import TFLocoformer
from tests.support.model_checks import gradients, relative, shaken

MODELS: dict[str, Callable[[], nn.Module]] = {
    "conv_tasnet": lambda: ConvTasNet(2, 12, 8, 4, 10, 14, 6, num_blocks=3, num_repeats=1),
    "sepformer": lambda: SepFormer(2, 12, 8, 4, 10, num_layers=1, num_heads=3, num_hidden=20),
    "dprnn": lambda: DPRNN(2, 12, 8, 4, 10, 14, chunk_size=10, num_repeats=1),
    "dptnet": lambda: DPTNet(2, 12, 8, 4, 3, 14, chunk_size=10, num_repeats=1),
    "sandglasset": lambda: Sandglasset(2, 12, 8, 4, 10, 16, 3, 14, 2, dropout=0.0),
    "tf_locoformer": lambda: TFLocoformer(2, 16, 8, 1, 12, 3, 10),
    "tf_gridnet": lambda: TFGridNet(2, 16, 8, 1, 12, 10, num_heads=3, num_keys=20),
}


@contextmanager
def as_on_a_gpu(compile: bool) -> Iterator[None]:
    """Let the models choose what they choose on a GPU, compiled or not."""
    with ExitStack() as stack:
        for module in ("compiling", "conv_block", "dual_path"):
            stack.enter_context(mock.patch(f"sepdist.models.{module}.on_gpu", lambda _: True))
        if not compile:
            stack.enter_context(mock.patch.object(compiling, "has_compiler", lambda: False))
        yield


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_the_ways_of_a_gpu_give_the_estimates_and_gradients_of_a_cpu(
    name: str, compile: bool
) -> None:
    torch.manual_seed(0)
    model, mixture = shaken(MODELS[name]()).double(), torch.randn(2, 203, dtype=torch.float64)
    with mock.patch.object(compiling, "has_compiler", lambda: False):
        expected = [model(mixture), *gradients(model, mixture)]
    with as_on_a_gpu(compile):
        got = [model(mixture), *gradients(model, mixture)]
    # The positions of these two are sines in float32, which compiled code rounds differently.
    limit = 1e-6 if name in ("sandglasset", "tf_locoformer") and compile else 1e-9
    for one, other in zip(got, expected, strict=True):
        assert torch.allclose(
            one, other, rtol=limit, atol=limit * max(0.1, float(other.detach().abs().max()))
        )


@pytest.mark.slow
def test_blocks_and_lengths_share_the_compilations_of_a_gpu() -> None:
    torch._dynamo.reset()
    compiling._compile.cache_clear()
    model = SepFormer(2, 12, 8, 4, 10, num_layers=3, num_heads=3, num_hidden=20)
    with as_on_a_gpu(compile=True):
        model(torch.randn(2, 203)).sum().backward()
        with torch._dynamo.config.patch(error_on_recompile=True):
            for shape in ((2, 403), (3, 304)):
                model(torch.randn(shape)).sum().backward()


@pytest.mark.slow
def test_pytorch_dispatches_at_most_500_operations_for_a_micro_batch_of_conv_tasnet() -> None:
    counts = operations.count("conv_tasnet", 2, 0.25)
    assert counts["library_calls"] >= 24 * 6  # six matrix products in each block
    assert counts["operations"] <= 500 and counts["launches"] <= 960


@pytest.mark.parametrize("shape", [(3, 50, 6), (2, 5, 10, 6)])
def test_the_norm_of_a_gpu_has_no_error_beyond_rounding(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = 3 * torch.randn(shape) + 7
    gain, shift = torch.randn(2, 6)
    expected = global_norm(x.double(), gain.double(), shift.double())
    with as_on_a_gpu(compile=False):
        assert relative(global_norm(x, gain, shift), expected.float()) < 1e-6
        assert global_norm(x.bfloat16(), gain, shift).dtype == torch.float32
