"""The bidirectional LSTM against torch's own in float64, and what the models rely on."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from sepdist.models import lstm
from sepdist.models.lstm import BiLSTM
from tests.support.model_checks import relative

BF16_STEPS = """
import torch
from sepdist.models.dprnn import DPRNN
from sepdist.models.dptnet import DPTNet
from sepdist.models.sandglasset import Sandglasset

assert torch.backends.cpu.get_cpu_capability() != "AVX512"
sizes = {"num_filters": 8, "kernel_size": 4, "stride": 2, "num_hidden": 6, "num_heads": 2}
for model in (
    DPRNN(2, 8, 4, 2, 8, 6, 4, 1),
    DPTNet(2, **sizes, chunk_size=4, num_repeats=1),
    Sandglasset(2, **sizes, num_features=8, chunk_size=4, num_blocks=3),
):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(1, 40)).square().mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    print(type(model).__name__)
"""


def pair(features: int, hidden: int) -> tuple[BiLSTM, nn.LSTM]:
    """Ours and torch's with the same weights, large enough to saturate some gates."""
    torch.manual_seed(0)
    ours = BiLSTM(features, hidden)
    theirs = nn.LSTM(features, hidden, bidirectional=True, batch_first=True).double()
    with torch.no_grad():
        for own, name in zip(
            ours.parameters(), ("weight_ih", "weight_hh", "bias_ih", "bias_hh"), strict=True
        ):
            own.mul_(3)
            for direction, suffix in enumerate(("_l0", "_l0_reverse")):
                getattr(theirs, name + suffix).copy_(own[direction])
    return ours, theirs


@pytest.mark.parametrize(
    ("rows", "steps", "features", "hidden"),
    [(1, 1, 3, 64), (2, 1, 5, 64), (24, 9, 16, 64), (61, 4, 7, 128), (3, 40, 20, 64)],
)
def test_outputs_and_all_gradients_are_those_of_torch_in_float64(
    rows: int, steps: int, features: int, hidden: int
) -> None:
    ours, theirs = pair(features, hidden)
    x = (2 * torch.randn(rows, steps, features)).requires_grad_()
    wide = x.detach().double().requires_grad_()
    out, expected = ours(x), theirs(wide)[0]
    assert relative(out, expected) < 1e-6
    weights = torch.randn_like(expected)
    got = torch.autograd.grad((out * weights.float()).sum(), [x, *ours.parameters()])
    grads = torch.autograd.grad((expected * weights).sum(), [wide, *theirs.parameters()])
    stacked = [grads[0]] + [torch.stack([grads[1 + k], grads[5 + k]]) for k in range(4)]
    for a, b in zip(got, stacked, strict=True):
        assert relative(a, b) < 2e-6 if b.abs().max() else a.abs().max() == 0


def test_tiny_and_huge_inputs_keep_their_precision_and_nan_stays_nan() -> None:
    ours, theirs = pair(16, 64)
    with torch.no_grad():
        for p in (ours.in_bias, ours.hidden_bias, theirs.bias_ih_l0, theirs.bias_hh_l0):
            p.zero_()
        theirs.bias_ih_l0_reverse.zero_(), theirs.bias_hh_l0_reverse.zero_()
        for scale in (1e-20, 1e-6, 1e-2, 1.0, 1e3, 1e10):
            x = scale * torch.randn(4, 5, 16)
            assert relative(ours(x), theirs(x.double())[0]) < 2e-6
        x[1, 2, 3] = torch.nan
        bad = ours(x).isnan()
    assert bad[1, 2].all() and not bad[[0, 2, 3]].any()


def test_a_sequence_gives_the_same_bits_alone_among_others_and_at_any_number_of_threads() -> None:
    ours, _ = pair(8, 64)
    x = torch.randn(53, 6, 8)
    together = ours(x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert torch.equal(ours(x), together)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat([ours(x[:1]), ours(x[1:30]), ours(x[30:])]), together)
    with torch.no_grad():
        assert torch.equal(ours(x), together)


def test_without_the_kernel_torch_runs_on_the_same_parameters_in_every_precision() -> None:
    ours, _ = pair(6, 64)
    x = torch.randn(3, 5, 6)
    expected = ours(x)
    ours.compiled = False
    assert relative(ours(x), expected) < 1e-6
    assert relative(ours.double()(x.double()), expected) < 1e-6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative(ours.float()(x), expected) < 0.02


def test_a_second_backward_pass_is_refused() -> None:
    ours, _ = pair(4, 64)
    loss = ours(torch.randn(2, 3, 4)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_a_compiler_that_fails_is_reported_once_and_torch_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ours, _ = pair(4, 64)
    x = torch.randn(2, 3, 4)
    expected = ours(x)
    monkeypatch.setenv("CXX", "false")
    lstm._library.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert relative(ours(x), expected) < 1e-6
        ours(x)
    lstm._library.cache_clear()
    assert (
        len([record for record in caplog.records if "torch's LSTM is used" in record.message]) == 1
    )


def test_every_model_with_an_lstm_trains_in_bf16_without_avx512() -> None:
    older = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", BF16_STEPS], env=os.environ | older, capture_output=True, text=True
    )
    assert done.stdout.split() == ["DPRNN", "DPTNet", "Sandglasset"], done.stderr
