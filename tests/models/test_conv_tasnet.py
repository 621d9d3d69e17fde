"""Conv-TasNet against a textbook version in torch's convolutions, and its bits and compilations."""

import hashlib
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.models import OperationCounter
from sepdist.models import compiling
from sepdist.models.conv_block import ConvBlock
from sepdist.models.conv_tasnet import ConvTasNet, NormLinear
from sepdist.models.frames import cut_frames, overlap_add
from tests.support.model_checks import depend_on_speakers, gradients, moved_differ, relative

pytestmark = pytest.mark.xdist_group("compiled")  # one process compiles what all use


@pytest.fixture(scope="module", autouse=True)
def no_compilations_of_other_tests() -> None:
    torch._dynamo.reset()
    compiling._compile.cache_clear()


def small(**changes: object) -> ConvTasNet:
    """A model whose sizes all differ, with weights that make every term of the arithmetic count."""
    torch.manual_seed(0)
    sizes = {
        "num_filters": 32,
        "kernel_size": 10,
        "stride": 4,
        "num_bottleneck": 12,
        "num_hidden": 48,
        "num_skip": 8,
    }
    model = ConvTasNet(
        **(
            {"num_speakers": 2, "num_blocks": 4, "num_repeats": 2, "compile": False}
            | sizes
            | changes
        )
    )
    with torch.no_grad():
        for index, p in enumerate(model.parameters()):
            if p.numel() == 1:
                p.fill_((-0.3, 0.2, 0.4)[index % 3])
            else:
                p.add_(0.1 * torch.randn_like(p))
    return model


def textbook(model: ConvTasNet, mixture: Tensor) -> Tensor:
    """The paper's equations, channels first, with torch's own convolutions."""

    def gln(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        mean = x.mean((1, 2), keepdim=True)
        variance = (x - mean).square().mean((1, 2), keepdim=True)
        return gain[:, None] * (x - mean) / (variance + 1e-8).sqrt() + shift[:, None]

    length = mixture.shape[1]
    steps = max(0, -(-(length - model.kernel_size) // model.stride))
    padded = F.pad(mixture, (0, steps * model.stride + model.kernel_size - length))
    encoded = F.conv1d(padded[:, None], model.encoder.weight[:, None], stride=model.stride)
    x = gln(encoded, model.bottleneck.gain, model.bottleneck.shift)
    x = F.conv1d(x, model.bottleneck.weight[..., None], model.bottleneck.bias)
    skips = []
    for block in model.blocks:
        y = F.prelu(F.conv1d(x, block.in_weight[..., None], block.in_bias), block.prelu1)
        y = gln(y, block.gain1, block.shift1)
        reach = block.dilation * (len(block.taps) // 2)
        y = F.conv1d(
            y,
            block.taps.T[:, None],
            block.taps_bias,
            padding=reach,
            dilation=block.dilation,
            groups=y.shape[1],
        )
        y = gln(F.prelu(y, block.prelu2), block.gain2, block.shift2)
        residual, skip = F.conv1d(y, block.out_weight[..., None], block.out_bias).tensor_split(
            [x.shape[1]], 1
        )
        x = x + residual
        skips.append(skip)
    total = F.prelu(torch.stack(skips).sum(0), model.prelu.weight)
    masks = F.relu(F.conv1d(total, model.mask_conv.weight[..., None], model.mask_conv.bias))
    masked = masks.unflatten(1, (model.num_speakers, -1)) * encoded[:, None]
    waves = F.conv_transpose1d(
        masked.flatten(0, 1), model.decoder.weight.T[:, None], stride=model.stride
    )
    return waves.view(len(mixture), model.num_speakers, -1)[..., :length]


@pytest.mark.parametrize(
    ("num_speakers", "count"), [(1, 4_984_497), (2, 5_050_545), (3, 5_116_593)]
)
def test_the_paper_size_has_the_published_number_of_parameters(
    num_speakers: int, count: int
) -> None:
    assert sum(p.numel() for p in ConvTasNet(num_speakers).parameters()) == count


@pytest.mark.parametrize(
    "changes", [{}, {"num_taps": 5}, {"num_taps": 1}, {"num_speakers": 3, "num_skip": 20}]
)
@pytest.mark.parametrize("length", [203, 31, 10])
def test_estimates_and_all_gradients_agree_with_the_textbook_in_float64(
    changes: dict, length: int
) -> None:
    model = small(**changes).double()
    mixture = torch.randn(3, length, dtype=torch.float64)
    assert relative(model(mixture), textbook(model, mixture)) < 1e-12
    for got, expected in zip(
        gradients(model, mixture), gradients(model, mixture, textbook), strict=True
    ):
        assert torch.allclose(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kernel_size", "stride"), [(16, 8), (2, 1), (20, 10), (10, 3), (5, 5)])
def test_the_estimates_are_as_long_as_the_mixture_at_any_length(
    kernel_size: int, stride: int
) -> None:
    model = small(kernel_size=kernel_size, stride=stride)
    for length in (model.min_length, model.min_length + 1, 97, 400, 403):
        assert model(torch.randn(2, length)).shape == (2, 2, length)


def test_a_mixture_that_is_too_short_is_refused_with_its_shape() -> None:
    with pytest.raises(ValueError, match=r"\(1, 9\).*T >= 10"):
        small()(torch.zeros(1, 9))


def test_overlap_add_is_the_transpose_of_cutting_frames() -> None:
    torch.manual_seed(0)
    for kernel_size, stride, length in ((16, 8, 100), (10, 3, 50), (4, 4, 9), (7, 2, 7)):
        signal = torch.randn(2, length, dtype=torch.float64)
        frames = cut_frames(signal, kernel_size, stride)
        others = torch.randn_like(frames.contiguous())
        back = overlap_add(others, stride, length)
        assert torch.allclose((frames * others).sum(), (signal * back).sum())


def test_global_norm_gives_zero_mean_and_unit_variance_to_each_item() -> None:
    layer = NormLinear(6, 6)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(6))
        layer.bias.zero_()
    y = layer(3 * torch.randn(4, 50, 6) + torch.arange(4.0).view(4, 1, 1))
    assert y.mean((1, 2)).abs().max() < 1e-5
    assert (y.var((1, 2), correction=0) - 1).abs().max() < 1e-4


@pytest.mark.parametrize("dilation", [1, 4, 32])
def test_the_gradient_of_a_block_is_that_of_finite_differences(dilation: int) -> None:
    torch.manual_seed(0)
    block = ConvBlock(3, 5, 2, 3, dilation, compile=False).double()
    inputs = [torch.randn(2, 6, size, dtype=torch.float64, requires_grad=True) for size in (3, 2)]
    names = [name for name, _ in block.named_parameters()]

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        parameters = dict(zip(names, tensors[2:], strict=True))
        return torch.func.functional_call(block, parameters, tensors[:2])

    assert torch.autograd.gradcheck(run, [*inputs, *block.parameters()])


def test_a_silent_mixture_gives_finite_estimates_and_gradients() -> None:
    model = ConvTasNet(2, 32, 10, 4, 12, 48, 8, num_blocks=2, num_repeats=1, compile=False)
    model(torch.zeros(2, 100)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_model_with_a_frozen_encoder_trains_the_rest() -> None:
    model = small()
    model.encoder.requires_grad_(False)
    model(torch.randn(2, 100)).square().sum().backward()
    assert model.encoder.weight.grad is None
    assert all(torch.isfinite(model.blocks[0].in_weight.grad).all(0))


def test_every_parameter_has_a_gradient_of_its_own_shape() -> None:
    model = small()
    model(torch.randn(2, 100)).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("num_hidden", [12, 48])
def test_where_the_parameters_lie_in_memory_changes_no_bit(num_hidden: int) -> None:
    assert moved_differ(small(num_hidden=num_hidden), torch.randn(2, 400)) == []


def test_where_the_parameters_lie_in_memory_changes_no_bit_of_compiled_code() -> None:
    assert moved_differ(small(compile=True), torch.randn(2, 400)) == []


def test_the_output_parameters_are_those_that_depend_on_the_number_of_speakers() -> None:
    names = {
        name
        for name, _ in small().named_parameters()
        if name.startswith(ConvTasNet.output_parameters)
    }
    assert depend_on_speakers(small) == names
    assert (
        sum(p.numel() for n, p in ConvTasNet(2).named_parameters() if n.startswith("mask_conv"))
        == 132_096
    )


def test_compiled_and_eager_agree() -> None:
    eager, compiled = small(), small(compile=True)
    mixture = torch.randn(2, 2000)
    assert relative(compiled(mixture), eager(mixture)) < 1e-5
    by_eager = gradients(eager, mixture)
    whole = torch.cat([gradient.flatten() for gradient in by_eager]).norm()
    for got, expected in zip(gradients(compiled, mixture), by_eager, strict=True):
        # The gradient of a PReLU is one sum of many terms that almost cancel.
        assert (got - expected).norm() < 1e-5 * expected.norm() + 1e-6 * whole


def test_other_lengths_batches_and_dilations_compile_nothing_new() -> None:
    model = small(compile=True)
    model(torch.randn(3, 1000)).sum().backward()
    with torch.no_grad():
        model(torch.randn(1, 1000))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (20, 500, 1001, 5003):
            model(torch.randn(2, length)).sum().backward()
            with torch.no_grad():
                model.eval()(torch.randn(1, length))


def test_a_compiled_block_dispatches_at_most_20_operations_per_pass() -> None:
    model = small(compile=True)
    x, skip = model.bottleneck(torch.randn(2, 90, 32)), torch.zeros(2, 90, 8)
    model.blocks[0](x, skip)[0].sum().backward(retain_graph=True)
    with OperationCounter() as forward:
        outputs = model.blocks[0](x, skip)
    with OperationCounter() as backward:
        torch.autograd.grad(outputs, list(model.blocks[0].parameters()), outputs)
    assert 0 < forward.count <= 20 and 0 < backward.count <= 20


def test_grad_and_backward_and_another_thread_give_the_same_bits() -> None:
    model = small(compile=True)
    mixture = torch.randn(2, 777)
    by_grad = torch.autograd.grad(model(mixture).square().sum(), list(model.parameters()))

    def backward() -> None:
        model(mixture).square().sum().backward()

    for run in (
        backward,
        lambda: (thread := threading.Thread(target=backward), thread.start(), thread.join()),
    ):
        model.zero_grad()
        run()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), by_grad, strict=True))


def fingerprint() -> str:
    """The bits of the gradients and, through them, of the estimates."""
    digest = hashlib.sha256()
    for gradient in gradients(
        small(compile=True), torch.randn(2, 4000, generator=torch.Generator().manual_seed(2))
    ):
        digest.update(gradient.numpy().tobytes())
    return digest.hexdigest()


def test_another_process_gives_the_same_bits_at_the_same_number_of_threads() -> None:
    code = (
        f"import torch; torch.set_num_threads({torch.get_num_threads()}); "
        "from tests.models.test_conv_tasnet import fingerprint; print(fingerprint())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.split() == [fingerprint()] == [fingerprint()]


@pytest.mark.slow
def test_kernels_on_disk_serve_the_instruction_set_that_they_were_compiled_for(
    tmp_path: Path,
) -> None:
    code = (
        "import torch; from sepdist.models import conv_tasnet, compiling; "
        "masks, encoded = torch.randn(2, 30, 3, 37), torch.randn(2, 30, 37); "
        "masked = compiling.compiled_if(True, conv_tasnet.apply_masks)(masks, encoded); "
        "assert torch.equal(masked, conv_tasnet.apply_masks(masks, encoded))"
    )
    for capability in ({}, {"ATEN_CPU_CAPABILITY": "avx2"}, {"ATEN_CPU_CAPABILITY": "default"}):
        environment = os.environ | capability | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parents[2],
            env=environment,
            check=True,
        )


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_bf16_autocast_is_no_further_from_fp32_than_the_textbook_under_autocast(
    compile: bool,
) -> None:
    model = small(compile=compile)
    mixture = torch.randn(2, 1000)
    expected = gradients(model, mixture)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        estimates, by_textbook = model(mixture), textbook(model, mixture)
        got, got_by_textbook = gradients(model, mixture), gradients(model, mixture, textbook)
    assert estimates.dtype == torch.float32 and all(
        gradient.dtype == torch.float32 for gradient in got
    )
    assert relative(estimates, model(mixture)) < 1.2 * relative(by_textbook, model(mixture)) < 0.05
    whole, textbook_whole, expected_whole = (
        torch.cat([g.flatten() for g in x]) for x in (got, got_by_textbook, expected)
    )
    assert relative(whole, expected_whole) < 1.2 * relative(textbook_whole, expected_whole)


COMPILERS = ", ".join(filter(None, (os.environ.get("CXX"), "g++", "clang++")))


@pytest.mark.parametrize(
    ("found", "torch_file", "reason"),
    [
        (None, torch.__file__, f"no C++ compiler found ({COMPILERS})"),
        ("g++", "/a b/torch.py", "torch cannot link in /a b/torch.py, a path with a blank"),
    ],
)
def test_where_torch_cannot_compile_the_model_runs_as_it_is_and_says_so_once(
    found: str | None,
    torch_file: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: found)
    monkeypatch.setattr(torch, "__file__", torch_file)
    compiling.has_compiler.cache_clear()
    mixture = torch.randn(1, 300)
    with caplog.at_level(logging.WARNING):
        estimates = small(compile=True)(mixture)
    compiling.has_compiler.cache_clear()
    assert torch.equal(estimates, small()(mixture))
    assert [record.message for record in caplog.records if "uncompiled" in record.message] == [
        f"{reason}: models run uncompiled, about half as fast"
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *(({"stride": 11}, "stride=11"), ({"num_taps": 2}, "num_taps=2")),
        *(({"num_speakers": 0}, "num_speakers=0"), ({"num_repeats": -1}, "num_repeats=-1")),
        *(({"num_blocks": 0}, "num_blocks=0"), ({"num_filters": 0}, "num_filters=0")),
    ],
)
def test_sizes_that_cannot_work_are_refused_by_name(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small(**changes)
