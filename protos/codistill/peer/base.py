"""What a student's training loop exchanges its outputs through.

There are two: :class:`codistill.peer.grpc.GrpcTransport` speaks to a server, and the in-process run has its own, on
the same core. The loop cannot tell them apart, and their numbers are the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from codistill.v1 import distillation_pb2 as pb

__all__ = ["Transport"]


class Transport(Protocol):
    """One student's session with the run."""

    def join(self, request: pb.JoinRequest) -> pb.JoinResponse:
        """Opens the session."""
        ...

    def send(self, contribution: pb.Contribution) -> None:
        """Publishes a round's outputs; does not wait."""
        ...

    def receive(self, number: int) -> pb.Targets:
        """Returns the targets of the round sent last, waiting for them."""
        ...

    def report(self, report: pb.ReportRequest) -> None:
        """Reports progress; does not wait. The session is filled in. What cannot be delivered now goes with the next."""
        ...

    def undelivered(self) -> Sequence[pb.Measurement]:
        """Returns the measurements that were reported and are not known to have arrived."""
        ...

    def leave(self, reason: pb.LeaveReason.ValueType, message: str) -> None:
        """Delivers what is left to report and ends the session."""
        ...

    def close(self) -> None:
        """Frees the connection; the session, if it is open, breaks."""
        ...
