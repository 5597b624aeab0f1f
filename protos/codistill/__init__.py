"""The contract of codistill: what workers and the aggregation server agree on.

Both sides import this package; it imports neither. A line for each room:

* :mod:`codistill.v1`: the wire's messages, generated from ``distillation.proto``.
* :mod:`codistill.config`: the experiment file.
* :mod:`codistill.wire`: what crosses the network, and what protects it.
* :mod:`codistill.peer`: taking part in a run.
* :mod:`codistill.methods`: what a method is, on either side.
* :mod:`codistill.rundir`: what a run leaves on disk.
* :mod:`codistill.process`: what every process shares.
"""

PROTOCOL_VERSION = 3
"""The version of the contract's behaviour; a worker and a server must speak the same."""

__version__ = "0.1.0"
