"""The best assignment against brute force, below and above the change of method."""

import itertools

import pytest
import torch

from sepdist.metrics import permutation
from sepdist.metrics.permutation import best_permutation, permutation_rank, reorder


@pytest.mark.parametrize("num_sources", [1, 2, 3, 4, 5])
def test_the_best_assignment_agrees_with_brute_force(num_sources: int) -> None:
    torch.manual_seed(num_sources)
    scores = torch.randn(20, num_sources, num_sources)
    best, order = best_permutation(scores)
    for item in range(20):
        by_total = {
            p: sum(float(scores[item, p[j], j]) for j in range(num_sources))
            for p in itertools.permutations(range(num_sources))
        }
        expected = max(by_total, key=by_total.__getitem__)
        assert tuple(order[item].tolist()) == expected
        assert float(best[item]) == pytest.approx(by_total[expected] / num_sources, abs=1e-6)


@pytest.mark.parametrize("num_sources", [2, 3, 4])
def test_the_rank_is_the_place_in_the_lexicographic_list(num_sources: int) -> None:
    orders = torch.tensor(list(itertools.permutations(range(num_sources))))
    assert permutation_rank(orders).tolist() == list(range(len(orders)))


@pytest.mark.parametrize("num_sources", [2, 3, 4])
def test_the_order_brings_shuffled_sources_back(num_sources: int) -> None:
    torch.manual_seed(0)
    sources = torch.randn(3, num_sources, 50)
    estimates = torch.stack([item[torch.randperm(num_sources)] for item in sources])
    scores = -(estimates.unsqueeze(2) - sources.unsqueeze(1)).square().sum(-1)
    assert torch.equal(reorder(estimates, best_permutation(scores)[1]), sources)


@pytest.mark.parametrize("num_sources", [3, 4])
def test_the_gradient_reaches_the_chosen_pairs_only(num_sources: int) -> None:
    scores = (10.0 * torch.eye(num_sources)).expand(2, -1, -1).clone().requires_grad_()
    best_permutation(scores)[0].sum().backward()
    assert torch.allclose(scores.grad, torch.eye(num_sources).expand(2, -1, -1) / num_sources)


def test_equal_assignments_give_the_first() -> None:
    assert best_permutation(torch.zeros(1, 3, 3))[1].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("num_sources", [2, 4])
def test_scores_that_are_not_finite_stay_so_and_do_not_stop_the_program(num_sources: int) -> None:
    best, order = best_permutation(torch.full((1, num_sources, num_sources), torch.nan))
    assert torch.isnan(best).all()
    assert sorted(order[0].tolist()) == list(range(num_sources))


def test_a_matrix_that_is_not_square_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 2\)"):
        best_permutation(torch.zeros(1, 3, 2))


@pytest.mark.parametrize("num_sources", [4, 5])
def test_a_device_that_tries_all_assignments_finds_those_of_the_hungarian_method(
    num_sources: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = torch.randn(6, num_sources, num_sources)
    means, orders = best_permutation(scores)
    monkeypatch.setattr(permutation, "MAX_EXHAUSTIVE", permutation.MAX_EXHAUSTIVE_ON_DEVICE)
    tried_means, tried_orders = best_permutation(scores)
    assert torch.equal(orders, tried_orders) and torch.equal(means, tried_means)
