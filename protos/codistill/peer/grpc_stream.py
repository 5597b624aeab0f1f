"""One Exchange call over gRPC, read by a thread.

The thread puts what arrives into a queue. So every wait for a reply has a limit, and ends when the peer is asked to stop.
The session stays open meanwhile, for the Leave that follows.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any, cast

import grpc

from codistill.peer.grpc_calls import Broken, Damaged, Stub, decode_reply
from codistill.peer.steps import CALL_SECONDS
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.channel import SESSION_KEY
from codistill.wire.checksum import append_checksum, format_session

__all__ = ["Stream"]


class Stream:
    """One Exchange call. Its thread ends with it.

    Args:
        stub: the server's calls.
        session_id: the session that Join opened.
    """

    def __init__(self, stub: Stub, session_id: int) -> None:
        self._outgoing: queue.SimpleQueue[pb.ExchangeRequest | None] = queue.SimpleQueue()
        self._incoming: queue.SimpleQueue[pb.ExchangeResponse | grpc.RpcError] = queue.SimpleQueue()
        contributions: Iterator[pb.ExchangeRequest] = iter(cast("Any", self._outgoing.get), None)
        requests = (append_checksum(contribution, str(session_id)) for contribution in contributions)
        self._call: Any = stub.exchange(requests, metadata=((SESSION_KEY, format_session(session_id)),))
        self._thread = threading.Thread(target=self._read, name="codistill-replies", daemon=True)
        self._thread.start()

    @property
    def active(self) -> bool:
        """Whether the call has not ended, as far as gRPC knows."""
        return bool(self._call.is_active())

    def send(self, contribution: pb.ExchangeRequest) -> None:
        """Queue a contribution; does not wait."""
        self._outgoing.put(contribution)

    def receive(self, seconds: float) -> pb.ExchangeResponse | None:
        """Return the next reply, or None if none comes in time.

        Args:
            seconds: how long to wait.

        Raises:
            grpc.RpcError: the stream is over.
        """
        try:
            item = self._incoming.get(timeout=seconds) if seconds > 0 else self._incoming.get_nowait()
        except queue.Empty:
            return None
        if isinstance(item, grpc.RpcError):
            self._incoming.put(item)  # a stream that is over stays over
            raise item
        return item

    def cancel(self) -> grpc.RpcError:
        """End the call if it has not ended, drop unread replies, and return how it ended."""
        self._outgoing.put(None)
        self._call.cancel()
        self._thread.join(CALL_SECONDS)
        try:
            while self.receive(0) is not None:
                pass
        except grpc.RpcError as error:
            return error
        return _ended()

    def _read(self) -> None:
        try:
            for raw in self._call:
                self._incoming.put(decode_reply(raw))
        except grpc.RpcError as error:
            self._incoming.put(error)
            if isinstance(error, Damaged):
                self._call.cancel()
        else:
            self._incoming.put(_ended())


def _ended() -> Broken:
    return Broken("the server ended the stream")
