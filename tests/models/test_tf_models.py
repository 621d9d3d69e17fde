"""TF-Locoformer and TF-GridNet: published sizes, ESPnet's estimates, padding, learning."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sepdist.models.attention import rotate
from sepdist.models.tf_gridnet import TFGridNet
from sepdist.models.tf_locoformer import TFLocoformer
from sepdist.objectives.masked import Masked
from sepdist.objectives.mixit import MixIT
from tests.support.espnet import ESPnet, formula_mixture, formula_weights
from tests.support.model_checks import improvement_learnt, relative, shaken

SPECTRA = {"num_speakers": 3, "fft_size": 32, "stride": 16, "num_layers": 2, "num_features": 12}
LOCOFORMER = SPECTRA | {"num_heads": 3, "num_hidden": 10}
GRID = SPECTRA | {"num_hidden": 10, "num_heads": 3, "num_keys": 40}
# Ours, and ESPnet's words for the same.
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "tf_locoformer": (
        TFLocoformer,
        LOCOFORMER | {"kernel_size": 4},
        {"conv1d_kernel": 4, "conv1d_shift": 1},
    ),
    "tf_locoformer with a stride": (
        TFLocoformer,
        LOCOFORMER | {"kernel_size": 5, "kernel_stride": 2},
        {"conv1d_kernel": 5, "conv1d_shift": 2},
    ),
    "tf_gridnet": (TFGridNet, GRID | {"kernel_size": 4}, {"emb_ks": 4, "emb_hs": 1}),
    "tf_gridnet with a stride": (
        TFGridNet,
        GRID | {"kernel_size": 5, "kernel_stride": 2},
        {"emb_ks": 5, "emb_hs": 2},
    ),
}
PEERS = {
    TFLocoformer: {
        "num_spk": 3,
        "n_layers": 2,
        "emb_dim": 12,
        "norm_type": "rmsgroupnorm",
        "n_heads": 3,
        "attention_dim": 12,
        "ffn_type": ["swiglu_conv1d"] * 2,
        "ffn_hidden_dim": [10, 10],
    },
    TFGridNet: {
        "n_layers": 2,
        "emb_dim": 12,
        "lstm_hidden_units": 10,
        "attn_n_head": 3,
        "attn_approx_qk_dim": 40,
    },
}
S = {"num_layers": 4, "num_features": 96, "num_hidden": 256}


@pytest.mark.parametrize(
    ("kind", "sizes", "count"),
    [
        (TFLocoformer, S, 5_031_012),  # published: S 5.0, M 15.0, L 22.5 million
        (TFLocoformer, {}, 14_975_620),
        (TFLocoformer, {"num_layers": 9}, 22_459_780),
        (TFGridNet, {}, 14_435_602),  # published: 14.4 or 14.5 million
    ],
)
def test_the_published_sizes_have_the_published_numbers_of_parameters(
    kind: Any, sizes: dict[str, int], count: int
) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in kind(**sizes).parameters()) == count


def test_the_parameters_of_the_medium_locoformer_are_those_of_its_layers() -> None:
    convolutions = (128 * 768 * 4 + 768) + (384 * 128 * 4 + 128)
    path = 2 * convolutions + 4 * 128 * 128 + 3 * 128
    ends = (2 * 9 * 128 + 128) + 2 * 128 + (4 * 9 * 128 + 4)
    assert 6 * 2 * path + ends == 14_975_620


@pytest.mark.slow
def test_the_multiply_adds_of_a_locoformer_are_those_worked_out_by_hand() -> None:
    features, hidden, kernel, frames, bins = 8, 12, 4, 126, 17  # frames: 1 + 2000 / 16
    sizes = {"fft_size": 32, "stride": 16, "num_layers": 1, "num_features": features}
    sizes |= {"num_hidden": hidden, "kernel_size": kernel, "num_heads": 2}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        TFLocoformer(**sizes)(torch.randn(1, 2000))
    total = (2 * 9 * features + 4 * 9 * features) * frames * bins  # the two ends
    for rows, length in ((frames, bins), (bins, frames)):
        places = rows * (length + kernel - 1)
        total += 2 * places * kernel * (features * 2 * hidden + hidden * features)
        total += rows * length * (4 * features**2 + 2 * length * features)
    assert counter.get_total_flops() == 2 * total


# Twelve of ESPnet's estimates for formula_weights and formula_mixture(403).
RECORDED = {
    "tf_locoformer": """-0.301339 -0.560794 0.823 0.395113 -0.205922 0.317264
        -0.204817 0.100157 0.41241 0.202845 -0.0493736 -0.225182""",
    "tf_locoformer with a stride": """-0.30912 -1.95276 0.872831 1.61197 -0.228855 0.95921
        -0.281742 0.64746 -0.00264231 -0.683417 0.283371 -0.226232""",
    "tf_gridnet": """-0.178975 -0.426991 0.724935 0.361756 -0.267843 0.20402
        -0.0715522 0.216216 0.197271 0.23304 -0.0500366 -0.359852""",
    "tf_gridnet with a stride": """-0.053658 -0.929875 0.742126 0.857781 -0.403756 0.401177
        0.00567449 -0.0252225 0.13437 0.476563 -0.0884942 -0.26851""",
}


def sampled(estimates_BST: Tensor) -> Tensor:
    """Twelve of the estimates."""
    return estimates_BST[:, :, [0, 150, 300, 370]].flatten()[::2]


@pytest.mark.parametrize("name", CASES)
def test_estimates_are_those_that_espnet_gave_for_the_same_weights(name: str) -> None:
    kind, sizes, _ = CASES[name]
    ours = formula_weights(kind(**sizes, padding="none"))
    expected = torch.tensor([float(value) for value in RECORDED[name].split()])
    assert relative(sampled(ours(formula_mixture(403))), expected) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_estimates_are_espnets_with_its_weights_at_any_length(name: str) -> None:
    kind, sizes, words = CASES[name]
    torch.manual_seed(0)
    ours = shaken(kind(**sizes, padding="none"))
    try:
        peer = ESPnet(ours, PEERS[kind] | words)
    except ImportError as error:
        pytest.skip(f"{error}; to compare, install (without dependencies) espnet and torch_complex")
    with torch.no_grad():
        for length in (17, 160, 403, 415):
            mixture = 3 * torch.randn(2, length)
            assert relative(ours(mixture), peer(mixture)) < 1e-5
        whole = kind(**sizes, padding="end")
        whole.load_state_dict(ours.state_dict())
        assert relative(whole(mixture := torch.randn(2, 400)), peer(mixture)) < 1e-5
        assert relative(whole(mixture := torch.randn(2, 403)), peer(mixture)) > 1e-3


@pytest.mark.parametrize("kind", [TFLocoformer, TFGridNet])
def test_a_louder_mixture_has_louder_estimates(kind: Any) -> None:
    torch.manual_seed(0)
    model, mixture = kind(**(LOCOFORMER if kind is TFLocoformer else GRID)), torch.randn(1, 90)
    assert relative(model(1000 * mixture), 1000 * model(mixture)) < 1e-5


def test_padding_that_is_unknown_and_strides_that_leave_gaps_are_refused() -> None:
    with pytest.raises(ValueError, match="padding='both': choose end or none"):
        TFGridNet(**GRID, padding="both")
    with pytest.raises(ValueError, match="stride=17 with fft_size=32"):
        TFLocoformer(**(LOCOFORMER | {"stride": 17}))
    with pytest.raises(ValueError, match="num_features=10: choose a multiple of 4"):
        TFLocoformer(**(LOCOFORMER | {"num_features": 10}))
    with pytest.raises(ValueError, match="num_heads=4 of an even size"):
        TFLocoformer(**(LOCOFORMER | {"num_heads": 4}))


def test_rotary_positions_make_products_depend_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 6, dtype=torch.float64)
    products = rotate(query.expand(9, 6)) @ rotate(key.expand(9, 6)).T
    assert torch.allclose(products[2:, 2:], products[:-2, :-2], atol=1e-6)
    assert not torch.allclose(products[2:, :-2], products[:-2, 2:], atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rate"), [(TFLocoformer, 5e-3), (TFGridNet, 5e-3)])
def test_some_steps_on_one_batch_learn_it(kind: Any, rate: float) -> None:
    torch.manual_seed(0)
    sizes = LOCOFORMER if kind is TFLocoformer else GRID
    first, last = improvement_learnt(kind(**(sizes | {"num_speakers": 2})), rate)
    assert last > first + 5 and last > 5


@pytest.mark.parametrize("kind", [TFGridNet, TFLocoformer])
def test_objectives_know_that_they_do_not_mask_and_how_many_outputs_they_have(kind: type) -> None:
    sizes = {"fft_size": 16, "stride": 8, "num_layers": 1, "num_features": 12, "num_heads": 3}
    model = kind(num_speakers=2, num_hidden=10, **sizes)
    mixture = torch.randn(1, 400)
    mixture[0, 100:180] = 0.0  # the spans of a masked objective, which these networks can fill
    assert model(mixture)[0, 0, 120:160].abs().min() > 0
    Masked(seed=0).check_model(model)
    with pytest.raises(ValueError, match=r"more than 2 outputs: set model\.num_speakers=4"):
        MixIT().check_model(model)
