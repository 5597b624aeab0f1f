"""The transport: how a peer exchanges its outputs with a run.

Two classes implement :class:`Transport`. :class:`codistill.peer.grpc.GrpcTransport` talks to an aggregation server.
``codistill_deploy.launch.in_process.InProcessTransport`` talks to the server's coordinator in the same process. Training
loops cannot tell them apart: the targets of both are the same bits.

A new transport is one file on each side:

* here, a class that implements :class:`Transport`;
* on the server, a class that implements ``codistill_server.coordinator.Outbox``, one object for each session, and a
  ``codistill_server.coordinator.Submit``, which runs the work of a round.

``tests/protos/peer/test_transports.py`` checks what is promised here of every transport, and that none is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from codistill.v1 import distillation_pb2 as pb

__all__ = ["Transport"]


class Transport(Protocol):
    """One peer's session with a run.

    A training loop calls ``join`` once. For each round it calls ``send``, then ``receive``. It may ``report`` between
    rounds. It ends with ``leave``, and always with ``close``. All calls come from one thread.

    A transport that can lose its connection restores it inside these calls, and sends an open contribution again. Limits
    on waiting come from the settings ``exchange.connect_timeout`` and ``exchange.give_up_after``. A call may exceed its
    limit by the seconds of one last attempt.

    Calls that block can raise two errors; ``send`` can raise the first:

    * :class:`codistill.peer.errors.PeerError` ends the peer; its ``code`` is the exit code of the peer's process. An
      answer of the run that ends the peer is raised as this, with the code of
      :attr:`codistill.peer.steps.Failure.exit_code`.
    * :class:`codistill.peer.errors.Interrupted` ends a wait because the peer was asked to stop. The session stays open, so
      that ``report`` and ``leave`` can follow.

    Before ``join``, ``receive``, ``report`` and a ``leave`` with FINISHED raise a plain ``RuntimeError``; the other calls
    do not fail. Once the transport knows that a newer peer of the participant has joined, ``join``, ``receive``, ``report``
    and a ``leave`` with FINISHED raise SUPERSEDED; ``send`` may.
    """

    def join(self, request: pb.JoinRequest) -> pb.JoinResponse:
        """Open the session.

        Blocks until the run accepts the peer, for at most ``connect_timeout``.

        Args:
            request: names the participant, its experiment, its data and its outputs. The transport fills in ``worker_id``
                and ``session_id``, and may change ``first_round`` and ``steps_trained`` in a later join.

        Returns:
            The session's id, and where the run stands.

        Raises:
            PeerError: UNREACHABLE: no server answered in time. REFUSED: the run does not accept this peer; the text says
                why. SUPERSEDED: a newer peer has taken the participant over.
            Interrupted: the peer was asked to stop.
        """
        ...

    def send(self, contribution: pb.ExchangeRequest) -> None:
        """Publish a round's outputs.

        Never blocks. The contribution stays open until ``receive`` returned its targets. The caller must not change it
        meanwhile. A contribution to a closed round, sent again, is answered with the same targets to the bit. One that is
        sent before ``join`` is published by ``join``.

        Args:
            contribution: the outputs for one round; one contribution is open at a time.

        Raises:
            PeerError: REFUSED: the contribution is invalid. DIVERGED: its values are not finite. SUPERSEDED: a newer peer
                joined. A transport that sends in the background raises all three from ``receive`` instead.
        """
        ...

    def receive(self, round_number: int) -> pb.Targets:
        """Return the targets of the round sent last.

        Blocks until the round is closed, for at most ``give_up_after``. A server that is away does not extend this.

        Args:
            round_number: the round of the open contribution.

        Raises:
            PeerError: GAVE_UP: the round stayed open; the text names the participants that it waits for. UNREACHABLE: the
                server stayed away. REFUSED, DIVERGED: it rejected the contribution. SUPERSEDED: a newer peer joined.
            Interrupted: the peer was asked to stop.
            RuntimeError: ``join`` was never called.
        """
        ...

    def report(self, report: pb.ReportRequest) -> None:
        """Report progress and measurements.

        Does not wait for an answer; what cannot be delivered now goes with the next report. A connection that is found
        broken is restored first, which blocks for at most ``give_up_after``. A peer that was asked to stop skips that.

        Args:
            report: the progress; the transport fills in ``session_id`` and keeps the message.

        Raises:
            PeerError: SUPERSEDED: a newer peer joined; raised as soon as the transport knows. The broken connection could
                not be restored, as for ``receive``. REFUSED: the run rejected the report. A transport that reports in the
                background raises this from a ``leave`` with FINISHED.
            Interrupted: the peer was asked to stop while the connection was restored.
            RuntimeError: ``join`` was never called.
        """
        ...

    def undelivered(self) -> Sequence[pb.Measurement]:
        """Return the reported measurements that are not known to have arrived, oldest first. Never blocks."""
        ...

    def leave(self, reason: pb.LeaveReason.ValueType, message: str) -> None:
        """Deliver what is left to report, and end the session.

        Blocks until the server has acknowledged it. Others wait for a participant until the server knows that it finished. So
        FINISHED is repeated over new connections, for at most ``give_up_after``. Any other reason is tried once, on a
        connection that is open; the end of the connection says enough otherwise. With such a reason nothing is raised.

        Args:
            reason: why the peer leaves.
            message: one line for the run's log.

        Raises:
            PeerError: a participant that finished could not say so, as for ``receive``. SUPERSEDED: a newer peer joined.
            Interrupted: the peer was asked to stop before it could say so.
            RuntimeError: a participant finished for which ``join`` was never called.
        """
        ...

    def close(self) -> None:
        """Free the connection and its threads, and break the session if it is open. May be called twice."""
        ...
