from __future__ import annotations

import itertools

import torch

from codistill_server.observability.agreement import Agreement

NAMES = ("ant", "bee", "cat")
VOTES = torch.tensor([[0, 1, 2, 0], [0, 1, 1, 1], [0, 2, 2, 0]])


def logits(votes: torch.Tensor) -> torch.Tensor:
    return 5 * torch.nn.functional.one_hot(votes, 3).float()


def measure(agreement: Agreement, round_number: int, rounds_per_epoch: int, *, right: bool) -> None:
    """Measure a round in which all are right, or in which they differ."""
    votes = VOTES[:1].expand(3, -1) if right else VOTES
    agreement.measure(round_number, NAMES, logits(votes), VOTES[0], rounds_per_epoch)


def test_pairs_and_the_ensemble() -> None:
    agreement = Agreement()
    agreement.measure(0, NAMES, logits(VOTES), torch.tensor([0, 1, 2, 1]))
    assert agreement.ensemble_accuracy == 0.75
    assert agreement.disagreement == {("ant", "bee"): 0.5, ("ant", "cat"): 0.25, ("bee", "cat"): 0.75}


def test_it_is_unknown_before() -> None:
    assert Agreement().ensemble_accuracy is None
    assert Agreement().disagreement == {}


def test_it_is_the_mean_over_one_epoch_whatever_was_before() -> None:
    agreement = Agreement()
    for number in range(5):
        measure(agreement, number, 4, right=False)
    assert agreement.ensemble_accuracy == 1.0
    assert agreement.disagreement["ant", "bee"] == 0.5
    for number in (5, 6):
        measure(agreement, number, 4, right=True)
    assert agreement.disagreement["ant", "bee"] == 0.25, "two of the last four rounds"
    for number in (7, 8):
        measure(agreement, number, 4, right=True)
    assert agreement.disagreement["ant", "bee"] == 0.0, "nothing is left of the rounds before the epoch"


def test_of_a_long_epoch_a_share_of_the_rounds_is_measured() -> None:
    agreement = Agreement()
    for number in range(1280):  # every tenth counts
        measure(agreement, number, 640, right=number % 10 > 0 or number < 640)
    assert agreement.disagreement["ant", "bee"] == 0.5


def test_a_pair_is_compared_where_both_were() -> None:
    agreement = Agreement()
    agreement.measure(0, NAMES, logits(VOTES), VOTES[0], 3)
    agreement.measure(1, ("ant", "bee"), logits(VOTES[[0, 0]]), VOTES[0], 3)
    assert agreement.disagreement == {("ant", "bee"): 0.25, ("ant", "cat"): 0.25, ("bee", "cat"): 0.75}
    for number in (2, 3):
        agreement.measure(number, ("ant", "bee"), logits(VOTES[[0, 0]]), VOTES[0], 3)
    assert agreement.disagreement == {("ant", "bee"): 0.0}


def test_of_many_students_every_pair_is_counted() -> None:
    names = tuple(f"s{number}" for number in range(40))
    votes = torch.randint(3, (40, 16), generator=torch.Generator().manual_seed(1))
    agreement = Agreement()
    agreement.measure(0, names, logits(votes), torch.zeros(16, dtype=torch.int64))
    expected = {
        (names[one], names[other]): float((votes[one] != votes[other]).double().mean())
        for one, other in itertools.combinations(range(40), 2)
    }
    assert agreement.disagreement == expected
