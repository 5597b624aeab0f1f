"""A closed round in bytes: the replies to its participants, and the method's state after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from codistill.methods.aggregator import Arrays, Targets
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.checksum import append_checksum
from codistill.wire.tensors import decode, encode

__all__ = ["decode_state", "encode_replies", "encode_state"]


def encode_replies(round_number: int, targets: Targets, teachers: Sequence[str], dtype: str) -> Mapping[str, bytes]:
    """Return the serialised replies to a round, with their checksums.

    They are keyed as in :class:`codistill_server.storage.journal.ClosedRound`: by participant, and under "" for every participant
    that has no reply of its own.

    Args:
        round_number: the round.
        targets: its targets.
        teachers: the teachers' names; a teacher learns nothing, so its reply has no targets.
        dtype: the element type of the targets on the wire.
    """
    no_targets: Arrays = {}
    by_participant = {**(targets.each or {}), **dict.fromkeys(teachers, no_targets)}
    if targets.shared is not None:
        by_participant[""] = targets.shared
    return {
        participant: append_checksum(
            pb.ExchangeResponse(
                targets=pb.Targets(
                    round=round_number, targets={name: encode(value, dtype) for name, value in arrays.items()}
                )
            )
        )
        for participant, arrays in by_participant.items()
    }


def encode_state(round_number: int, state: Mapping[str, torch.Tensor]) -> bytes:
    """Return the method's state after a round in bytes; float32, the precision in which it is used."""
    if not state:
        return b""
    arrays = {name: encode(value, "float32") for name, value in state.items()}
    return pb.Targets(round=round_number, targets=arrays).SerializeToString(deterministic=True)


def decode_state(state: bytes) -> Mapping[str, torch.Tensor]:
    """Return the method's state of :func:`encode_state`; empty for no bytes."""
    return {name: decode(value) for name, value in pb.Targets.FromString(state).targets.items()}
