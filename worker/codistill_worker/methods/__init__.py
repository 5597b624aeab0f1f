"""The methods: each turns a student's outputs and its round's targets into a loss.

The experiment's ``distillation.method`` names the module, :mod:`.kd` for example, and a module of the server has the same
name: it makes the targets. A method's module has these functions:

* ``objective(settings, context)`` returns the :class:`codistill.methods.Objective` of one student.
* ``teacher(settings, context)`` returns the network whose named outputs a teacher publishes; without it, the logits.

The losses are pure functions in :mod:`.losses`; :mod:`.features` reads hidden layers.
"""

from __future__ import annotations

from codistill_worker.methods.registry import create, teacher_network

__all__ = ["create", "teacher_network"]
