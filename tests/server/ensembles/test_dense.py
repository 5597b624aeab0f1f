from __future__ import annotations

import numpy as np
import pytest
import torch

from codistill_server import ensembles
from codistill_server.ensembles import dense

K, S, B, C = 3, 3, 4, 5


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3


def softmax(row: np.ndarray) -> np.ndarray:
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def test_by_hand() -> None:
    """Two students, two stages, one sample of two classes: only the peer's rows are seen."""
    half, third = [0.0, 0.0], [np.log(1 / 3), np.log(2 / 3)]
    sure, quarter = [np.log(0.9), np.log(0.1)], [np.log(0.25), np.log(0.75)]
    same, other = dense.dense_probabilities(torch.tensor([[[half], [third]], [[sure], [quarter]]]).double())
    expected = torch.tensor([[[[0.9, 0.1]], [[0.25, 0.75]]], [[[0.5, 0.5]], [[1 / 3, 2 / 3]]]], dtype=torch.float64)
    torch.testing.assert_close(same, expected)
    torch.testing.assert_close(other, expected.flip(1))


def test_by_loops() -> None:
    logits = drawn(K, S, B, C)
    same, other = dense.dense_probabilities(logits)
    z = logits.numpy()
    for k in range(K):
        for q in range(S):
            for b in range(B):
                peers = [student for student in range(K) if student != k]
                there = np.mean([softmax(z[peer, q, b]) for peer in peers], axis=0)
                elsewhere = np.mean([softmax(z[p, r, b]) for p in peers for r in range(S) if r != q], axis=0)
                np.testing.assert_allclose(same[k, q, b], there, atol=1e-12)
                np.testing.assert_allclose(other[k, q, b], elsewhere, atol=1e-12)


def test_one_more_student_is_given_what_it_would_get_as_the_first() -> None:
    logits = drawn(K, S, B, C)
    pooled = dense.pooled_dense_probabilities(logits)
    together = dense.dense_probabilities(torch.cat([torch.zeros(1, S, B, C).double(), logits]))
    for ours, theirs in zip(pooled, together, strict=True):
        torch.testing.assert_close(ours, theirs[0])


def test_rows_sum_to_one_and_are_finite_for_large_logits() -> None:
    for scale in (1.0, 1e4):
        for target in dense.dense_probabilities(drawn(K, S, B, C).float() * scale):
            assert target.dtype is torch.float32
            torch.testing.assert_close(target.sum(-1), torch.ones(K, S, B))


def test_permuting_students_permutes_targets_and_a_constant_per_row_changes_none() -> None:
    logits, order = drawn(K, S, B, C), torch.tensor([2, 0, 1])
    for before, after, shifted in zip(
        dense.dense_probabilities(logits),
        dense.dense_probabilities(logits[order]),
        dense.dense_probabilities(logits + drawn(K, S, B, 1)),
        strict=True,
    ):
        torch.testing.assert_close(after, before[order])
        torch.testing.assert_close(shifted, before)


def test_the_final_stages_are_deep_mutual_learning() -> None:
    logits = drawn(K, S, B, C)
    same, _ = dense.dense_probabilities(logits)
    assert torch.equal(same[:, -1], ensembles.peer_probabilities(logits[:, -1])[0])


def test_no_gradient_reaches_a_student() -> None:
    """A target that kept its graph would let one student's loss move another's weights."""
    logits = drawn(K, S, B, C).requires_grad_()
    made = (*dense.dense_probabilities(logits), *dense.pooled_dense_probabilities(logits))
    assert not any(target.requires_grad for target in made)


@pytest.mark.parametrize("shape", [(K, B, C), (K, 1, B, C), (1, S, B, C)])
def test_what_is_no_set_of_stages_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^logits: .*; allowed (is|are) "):
        dense.dense_probabilities(drawn(*shape))
