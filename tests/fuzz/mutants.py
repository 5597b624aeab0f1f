"""Bugs to inject into a server, so that a test sees that a campaign would find them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from codistill import PROTOCOL_VERSION
from codistill.methods.aggregator import RoundInputs, Targets
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.token import Token
from codistill_server import app, coordinator
from codistill_server.methods import kdcl

_Base: Any = app.Coordinator


class _Raises(_Base):
    """An error that nobody thought of gets out of a call."""

    def leave(self, request: pb.LeaveRequest) -> None:
        if request.reason > 3:
            raise KeyError(request.reason)
        super().leave(request)


class _Admits(coordinator.JoinAdmission):
    """A check is skipped for some values."""

    def check(self, request: pb.JoinRequest) -> None:
        if request.protocol_version == PROTOCOL_VERSION:
            super().check(request)


class _Keeps(_Base):
    """Something is kept of every call that is refused."""

    kept: list[bytearray] = []  # noqa: RUF012 - it must outlive everything

    def join(self, request: pb.JoinRequest) -> pb.JoinResponse:
        self.kept.append(bytearray(b"x" * 2**20))
        return super().join(request)


class _Finishes(_Base):
    """A participant that says it has finished is believed."""

    def _check_finished(self, participant: str) -> None:
        pass


def _turned(self: Any, inputs: RoundInputs) -> Targets:
    """One bit of one target is wrong, once in a while."""
    targets = _right(self, inputs)
    assert targets.shared is not None
    made = targets.shared["logits"].clone()
    if made[0, 1] < -1:  # in some rounds
        made[0, 1] = torch.nextafter(made[0, 1], torch.tensor(9.0))
    return Targets(shared={"logits": made})


def _matches(self: Token, value: str | bytes) -> bool:
    """The beginning of the token is enough."""
    _, right = self.metadata
    return str(value)[:20] == right[:20]


_right = kdcl.Ensemble.targets


def _with_coordinator(kind: type[Any]) -> Callable[[], None]:
    return lambda: setattr(app, "Coordinator", kind)


MUTANTS: Mapping[str, Callable[[], None]] = {
    "raises": _with_coordinator(_Raises),
    "admits": lambda: setattr(coordinator, "JoinAdmission", _Admits),
    "keeps": _with_coordinator(_Keeps),
    "finishes": _with_coordinator(_Finishes),
    "turned": lambda: setattr(kdcl.Ensemble, "targets", _turned),
    "matches": lambda: setattr(Token, "matches", _matches),
}


def inject_bug(name: str) -> None:
    """Inject a bug in this process, before it serves."""
    MUTANTS[name]()
