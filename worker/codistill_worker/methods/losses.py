"""The losses of the methods: pure functions of tensors, and one module of parameters that a loss learns.

Common to all:

* Logits are [B, C]: B samples, C classes. Labels are int64 [B].
* float32 and float64 are computed in themselves, float16 and bfloat16 in float32. Softmax and log-softmax are torch's own,
  so values and gradients are finite for any |z| up to 1e4 and far beyond.
* A `target` is constant: no gradient flows into it, even if it has a graph.
* KL(target ‖ student) is summed over classes and averaged over rows, in nats; the target is KL's first argument. With a
  temperature T both sides are softened, and T² keeps the size of the gradient for every T.
* Targets that are probabilities are divided by their sum, as rounding on the wire may have changed each by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "Rise",
    "VariationalInformation",
    "cross_entropy",
    "dense_cross_layer",
    "distillation",
    "divergence",
    "logit_regression",
    "mimicry",
    "relational_angle",
    "relational_distance",
    "rising_weight",
    "teacher_and_peer",
]

Rise = Literal["linear", "sigmoid", "step"]
"""How the weight of cross-architecture distillation grows."""

_STEEPNESS = 10.0
_STEPS = 4
_VARIANCE_FLOOR = 1e-5
_VARIANCE_AT_FIRST = 5.0


def divergence(target: Tensor, log_probabilities: Tensor) -> Tensor:
    """Return KL(target ‖ student) = (1/B)·Σ_b Σ_c t[b,c]·(log t[b,c] − log p[b,c]), in nats.

    Args:
        target: probabilities, [B, C]; a class of probability 0 adds 0.
        log_probabilities: the student's, [B, C].
    """
    return functional.kl_div(log_probabilities, target.detach(), reduction="batchmean")


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return −(1/B)·Σ_b Σ_c y'[b,c]·log softmax(z)[b,c] with y' = (1−ε)·onehot(y) + ε/C.

    Source: Szegedy et al. 2016, 'Rethinking the Inception Architecture', section 7.

    Args:
        logits: z, [B, C].
        labels: y, [B].
        label_smoothing: ε, from 0 to below 1.
    """
    return functional.cross_entropy(_wide(logits), labels, label_smoothing=label_smoothing)


def distillation(logits: Tensor, *, target: Tensor, temperature: float) -> Tensor:
    """Return T²·KL(softmax(t/T) ‖ softmax(z/T)).

    Source: Hinton et al. 2015, 'Distilling the Knowledge in a Neural Network', section 2. They write the cross-entropy
    of the softened target; the divergence differs by a constant and is 0 where student and teacher agree. With T = 1 it
    is the term of born-again networks (Furlanello et al. 2018).

    Args:
        logits: the student's z, [B, C].
        target: logits t, [B, C], constant.
        temperature: T.
    """
    softened = torch.softmax(_wide(target.detach()) / temperature, -1)
    return temperature**2 * divergence(softened, torch.log_softmax(_wide(logits) / temperature, -1))


def mimicry(logits: Tensor, *, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T²·KL(t ‖ softmax(z/T)), for a target that is a probability already.

    Source: Zhang et al. 2018, 'Deep Mutual Learning', the mimicry loss, at T = 1.

    Args:
        logits: the student's z, [B, C].
        target: probabilities t, [B, C], constant, made with the same T.
        temperature: T.
    """
    probabilities = _wide(target.detach())
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return temperature**2 * divergence(probabilities, torch.log_softmax(_wide(logits) / temperature, -1))


def logit_regression(logits: Tensor, *, target: Tensor) -> Tensor:
    """Return (1/(B·C))·Σ_b Σ_c (z[b,c] − t[b,c])².

    Source: Ba & Caruana 2014, 'Do Deep Nets Really Need to be Deep?', eq. 1, which has ½ of a sum over classes; the
    mean over classes leaves the learning rate's meaning the same for any number of them. A constant on a row of logits
    changes no prediction, and does change this loss.

    Args:
        logits: the student's z, [B, C].
        target: logits t, [B, C], constant.
    """
    return functional.mse_loss(_wide(logits), _wide(target.detach()))


def relational_distance(embedding: Tensor, *, target: Tensor) -> Tensor:
    """Return (1/B²)·Σ_i Σ_j h(ψ(x)[i,j] − ψ(t)[i,j]), the difference of two batches' distances among themselves.

    ψ(x)[i,j] = ‖x_i − x_j‖/μ, with μ the mean over all B·(B−1) pairs of distinct samples, i ≠ j. Pairs whose embeddings
    coincide count in μ, with a distance of 0. h is the Huber loss, ½d² up to |d| = 1 and |d| − ½ beyond. The outer mean
    is over all B² pairs, i = j among them, as in the authors' code. Scaling either side changes nothing. Distances of 0
    stay 0 and have no gradient. If all are 0, so is ψ: one sample alone, and two batches each of one repeated sample,
    lose 0.

    Source: Park et al. 2019, 'Relational Knowledge Distillation', RKD-D; Wang 2023, eq. 8. The authors' code has the same
    μ: it takes the mean of what is above 0, after raising the distances of distinct samples to at least 1e-6.

    Args:
        embedding: the student's x, [B, D].
        target: t, [B, D'], constant; D' may differ from D.
    """
    with torch.no_grad():
        wanted = _relative_distances(_wide(target))
    return functional.huber_loss(_relative_distances(_wide(embedding)), wanted)


def relational_angle(embedding: Tensor, *, target: Tensor) -> Tensor:
    """Return (1/B³)·Σ_i Σ_j Σ_k h(cos(x)[i,j,k] − cos(t)[i,j,k]), the difference of two batches' angles.

    cos(x)[i,j,k] is the cosine of the angle at x_j between x_i and x_k, or 0 where one of them is x_j or coincides with
    it. h is the Huber loss with β = 1. The mean is over all B³ triples, as in the authors' code. Scaling either side changes
    nothing; one sample alone, and two batches each of one repeated sample, lose 0. It takes memory for B²·D + B³ values.

    Source: Park et al. 2019, 'Relational Knowledge Distillation', RKD-A.

    Args:
        embedding: the student's x, [B, D].
        target: t, [B, D'], constant; D' may differ from D.
    """
    with torch.no_grad():
        wanted = _cosines(_wide(target))
    return functional.huber_loss(_cosines(_wide(embedding)), wanted)


class VariationalInformation(nn.Module):
    """The loss of one hidden layer: mean[½·((μ − t)²/σ² + log σ²)], the mean over all B·C'·H·W values.

    μ is the student's map after three 1×1 convolutions, of the target's number of channels, with rectifiers between them.
    σ² = softplus(α) + 1e-5, one for each of the target's channels, starting at 5. The student's optimiser learns both; no
    exported model has them. The loss is −log q(t | x) of a Gaussian q, without its constant ½·log 2π. Minimising it raises a
    lower bound on the information that the student's layer has of the teacher's.

    Source: Ahn et al. 2019, 'Variational Information Distillation for Knowledge Transfer', with the
    variance of each channel learnt.

    Args:
        channels: of the student's map, C.
        target_channels: of the target's, C'.

    Attributes:
        alpha: α, [C'].
    """

    def __init__(self, channels: int, target_channels: int) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(channels, target_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(target_channels, target_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(target_channels, target_channels, 1, bias=False),
        )
        start = math.log(math.expm1(_VARIANCE_AT_FIRST - _VARIANCE_FLOOR))
        self.alpha = nn.Parameter(torch.full((target_channels,), start))

    def variance(self) -> Tensor:
        """Return σ², [C']."""
        return functional.softplus(self.alpha) + _VARIANCE_FLOOR

    def forward(self, features: Tensor, *, target: Tensor) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            features: the student's map, [B, C, H, W].
            target: the teacher's, [B, C', H', W'], constant. If sizes differ, averages over patches bring both to the
                smaller height and the smaller width.
        """
        features, target = _wide(features), _wide(target.detach())
        height, width = (min(sides) for sides in zip(features.shape[2:], target.shape[2:], strict=True))
        features, target = (functional.adaptive_avg_pool2d(maps, (height, width)) for maps in (features, target))
        variance = self.variance()[:, None, None]
        return (0.5 * ((self.mean(features) - target) ** 2 / variance + variance.log())).mean()


def teacher_and_peer(
    logits: Tensor,
    labels: Tensor,
    *,
    teacher: Tensor | None,
    peer: Tensor,
    teacher_weight: float,
    peer_weight: float,
    temperature: float = 1.0,
) -> Tensor:
    """Return CE(z, y) + λ·T²·KL(softmax(t/T) ‖ softmax(z/T)) + β·KL(p ‖ softmax(z)): FDDML and HDDML of one student.

    FDDML has a teacher for both students, HDDML for the second alone. The first gets None, and learns from the labels and
    its peer.

    Source: Lukman & Yang 2022, 'Improving Deep Mutual Learning via Knowledge Distillation', as Wang 2023, 'Research on
    Knowledge Distillation Regularization Methods', eq. 12 to 16, gives it. There the losses of both students have
    KL(p_2 ‖ p_1); here each mimics its peer, KL(peer ‖ self). That HDDML's teacher guides the second student is eq. 16.

    Args:
        logits: the student's z, [B, C].
        labels: y, [B].
        teacher: the teacher's logits t, [B, C], constant; None without one.
        peer: the other student's probabilities p at T = 1, [B, C], constant.
        teacher_weight: λ.
        peer_weight: β.
        temperature: T of the teacher's term.
    """
    loss = cross_entropy(logits, labels) + peer_weight * mimicry(logits, target=peer)
    if teacher is not None:
        loss = loss + teacher_weight * distillation(logits, target=teacher, temperature=temperature)
    return loss


def dense_cross_layer(
    heads: Sequence[Tensor],
    labels: Tensor,
    *,
    same_stage: Tensor,
    other_stages: Tensor,
    auxiliary_weight: float = 1.0,
    same_weight: float = 1.0,
    other_weight: float = 1.0,
) -> Tensor:
    """Return CE(z_Q, y) + α·Σ_{q<Q} CE(z_q, y) + β·Σ_q KL(s_q ‖ p_q) + γ·Q·Σ_q KL(o_q ‖ p_q): DCM of one student.

    A student has Q auxiliary heads and a final one, z_Q; p_q = softmax(z_q). s_q is the mean probability of the peers'
    heads at the same stage, o_q that of their heads at the Q others. Q times the divergence from a mean has the
    gradient of Σ_{r≠q} KL(p'_r ‖ p_q), the sum over the Q others. It is smaller by a constant. With Q = 0 it is deep
    mutual learning.

    Source: Yao & Sun 2020, 'Knowledge Transfer via Dense Cross-Layer Mutual-Distillation', the total loss, with weights
    of 1; of more than one peer the mean.

    Args:
        heads: the student's logits z_q by stage, the final one last, each [B, C].
        labels: y, [B].
        same_stage: s, [Q + 1, B, C], constant.
        other_stages: o, [Q + 1, B, C], constant; not read where Q is 0.
        auxiliary_weight: α.
        same_weight: β.
        other_weight: γ.
    """
    others = len(heads) - 1
    loss = cross_entropy(heads[-1], labels)
    for stage, logits in enumerate(heads):
        if stage < others:
            loss = loss + auxiliary_weight * cross_entropy(logits, labels)
        loss = loss + same_weight * mimicry(logits, target=same_stage[stage])
        if others:
            loss = loss + other_weight * others * mimicry(logits, target=other_stages[stage])
    return loss


def rising_weight(epoch: float, *, start: float, end: float, highest: float, rise: Rise) -> float:
    """Return w(e), the weight of a distillation that grows during training.

    With u = (e − start)/(end − start), held within 0 and 1, and S the logistic function:

    * `linear`: w = highest·u.
    * `sigmoid`: w = highest·(S(10·u − 5) − S(−5))/(S(5) − S(−5)), flat at both ends.
    * `step`: w = highest·min(⌊4·u⌋ + 1, 4)/4: a quarter of it at first, and another quarter three times.

    Before `start` w is 0, from `end` on it is `highest`.

    Source: after Gao et al. 2019, 'Multistructure-Based Collaborative Online Distillation'; the curves are this
    project's.

    Args:
        epoch: e, with its fraction.
        start: where w begins to grow, in epochs.
        end: where it has grown, above `start`.
        highest: w in the end.
        rise: which curve.
    """
    if epoch < start:
        return 0.0
    share = min((epoch - start) / (end - start), 1.0)
    match rise:
        case "linear":
            return highest * share
        case "sigmoid":
            low, high = _logistic(-_STEEPNESS / 2), _logistic(_STEEPNESS / 2)
            return highest * (_logistic(_STEEPNESS * (share - 0.5)) - low) / (high - low)
        case "step":
            return highest * min(math.floor(_STEPS * share) + 1, _STEPS) / _STEPS


def _logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def _relative_distances(embedding: Tensor) -> Tensor:
    """Return ψ, [B, B]: distances over their mean of all pairs of distinct samples."""
    distances = _lengths(embedding[:, None] - embedding[None]).squeeze(-1)
    samples = len(embedding)
    mean = distances.sum() / max(samples * (samples - 1), 1)
    return distances / torch.where(mean > 0, mean, 1)


def _cosines(embedding: Tensor) -> Tensor:
    """Return the cosines at j between i and k, as [j, i, k]."""
    differences = embedding[None] - embedding[:, None]
    lengths = _lengths(differences)
    directions = differences / torch.where(lengths > 0, lengths, 1)
    return directions @ directions.transpose(1, 2)


def _lengths(vectors: Tensor) -> Tensor:
    """Return norms over the last dimension, which stays; the gradient of a norm of 0 is 0."""
    squares = vectors.square().sum(-1, keepdim=True)
    apart = squares > 0  # the root's slope at 0 is infinite, and infinity times 0 is no number
    return torch.where(apart, torch.where(apart, squares, 1).sqrt(), 0)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
