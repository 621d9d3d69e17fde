"""Which outputs are speakers: the loudest over the whole signal, in the order of the outputs."""

import torch

from sepdist.objectives.contract import speakers_of


def waves(*energies: float) -> torch.Tensor:
    """[M, 100], each with its energy in one sample, the first outputs' late."""
    result = torch.zeros(len(energies), 100)
    for number, energy in enumerate(energies):
        result[number, 99 - 7 * number] = energy**0.5
    return result


def test_the_loudest_outputs_of_each_item_stay_in_their_order() -> None:
    estimates = torch.stack([waves(1, 9, 0, 4), waves(5, 2, 7, 1)])
    found = speakers_of(estimates, num_loudest=2)
    assert torch.equal(found, torch.stack([estimates[0, [1, 3]], estimates[1, [0, 2]]]))
    assert torch.equal(speakers_of(estimates, num_loudest=4), estimates)


def test_of_equally_loud_outputs_the_first_are_taken() -> None:
    estimates = waves(1, 3, 3, 3, 0)[None]
    assert torch.equal(speakers_of(estimates, num_loudest=2), estimates[:, 1:3])
    assert torch.equal(speakers_of(torch.zeros(1, 4, 10), num_loudest=2), torch.zeros(1, 2, 10))


def test_outputs_of_another_task_are_left_out_before_any_is_chosen() -> None:
    estimates = waves(1, 2, 9)[None]
    assert torch.equal(speakers_of(estimates), estimates)
    assert torch.equal(speakers_of(estimates, num_extra_outputs=1), estimates[:, :2])
    assert torch.equal(
        speakers_of(estimates, num_extra_outputs=1, num_loudest=1), estimates[:, 1:2]
    )
