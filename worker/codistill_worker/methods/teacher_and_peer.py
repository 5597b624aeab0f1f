"""The loss of FDDML and HDDML (Lukman & Yang 2022): two students learn from each other, one or both from a teacher."""

from __future__ import annotations

from codistill.config.methods import Fddml, Hddml
from codistill.methods import LogitsObjective, Loss, Step, StudentContext
from codistill_worker.methods import losses

__all__ = ["TeacherAndPeerObjective"]


class TeacherAndPeerObjective(LogitsObjective):
    """CE + λ·T²·KL(softmax(t/T) ‖ softmax(z/T)) + β·KL(p ‖ softmax(z)).

    p is the other student's, t the teacher's, which the server sends to the students that it teaches. Printed forms have
    KL(p_2 ‖ p_1) in the loss of both students; here each mimics its peer.
    """

    publishes: tuple[str, ...] = ("logits",)

    def __init__(self, settings: Fddml | Hddml, context: StudentContext) -> None:
        super().__init__(context)
        self._settings = settings

    def loss(self, step: Step) -> Loss:
        """Return the loss of one step; the targets are `probabilities` and perhaps `logits`, [B, C]."""
        logits, settings = step.outputs["logits"], self._settings
        total = losses.teacher_and_peer(
            logits,
            step.labels,
            teacher=step.targets.get("logits"),
            peer=step.targets["probabilities"],
            teacher_weight=settings.weight,
            peer_weight=settings.peer_weight,
            temperature=settings.temperature,
        )
        cross_entropy = losses.cross_entropy(logits.detach(), step.labels)
        return Loss(total, cross_entropy, total.detach() - cross_entropy)
