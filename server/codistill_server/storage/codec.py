"""What a closed round is in bytes: the answers to its students, and the method's state after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from codistill.methods.aggregator import Arrays, Targets
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.checksum import append_checksum
from codistill.wire.tensors import decode, encode

__all__ = ["dump_state", "load_state", "make_replies"]


def make_replies(number: int, targets: Targets, teachers: Sequence[str], dtype: str) -> Mapping[str, bytes]:
    """Returns the answers to a round, serialised and sealed, as :class:`codistill_server.storage.journal.ClosedRound` has them.

    Args:
        number: the round.
        targets: what its students learn from.
        teachers: the teachers' names; they learn nothing, and are answered nothing.
        dtype: the element type of the targets on the wire.
    """
    nothing: Arrays = {}
    by_student = {**(targets.each or {}), **dict.fromkeys(teachers, nothing)}
    if targets.shared is not None:
        by_student[""] = targets.shared
    return {
        student: append_checksum(
            pb.ExchangeReply(
                targets=pb.Targets(round=number, targets={name: encode(value, dtype) for name, value in arrays.items()})
            )
        )
        for student, arrays in by_student.items()
    }


def dump_state(number: int, state: Mapping[str, torch.Tensor]) -> bytes:
    """Returns the method's state after a round, in the precision that it is used in."""
    if not state:
        return b""
    arrays = {name: encode(value, "float32") for name, value in state.items()}
    return pb.Targets(round=number, targets=arrays).SerializeToString(deterministic=True)


def load_state(state: bytes) -> Mapping[str, torch.Tensor]:
    """Returns what :func:`dump_state` was given."""
    return {name: decode(value) for name, value in pb.Targets.FromString(state).targets.items()}
