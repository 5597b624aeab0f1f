"""The methods: each turns the outputs of a round into targets.

The experiment's ``distillation.method`` names the module, :mod:`.kd` for example, and a module of the worker has the same
name: it turns the targets into a loss. A method's module has one function, ``aggregator(settings, students, teachers)``. It
returns the :class:`codistill.methods.aggregator.Aggregator` of a run with these settings and participants.

:mod:`.relay` and :mod:`.teacher_and_peer` hold what several methods share.
"""

from __future__ import annotations

from codistill_server.methods.registry import create

__all__ = ["create"]
