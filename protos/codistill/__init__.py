"""The contract of codistill: what workers and the aggregation server agree on.

Both sides import this package; it imports neither.

* :mod:`codistill.v1` holds the wire's messages, generated from ``distillation.proto``.
* :mod:`codistill.wire.tensors` turns tensors into messages and back.
* :mod:`codistill.wire.checksum` tells a message that was damaged on the way.
* :mod:`codistill.config.experiment` is the experiment file, of sections that have a module each; :mod:`codistill.config.errors`
  says what is wrong with one, and :mod:`codistill.config.fingerprint` what of it must be the same everywhere.
* :mod:`codistill.rundir.records` is what a run writes down about itself.
* :mod:`codistill.wire.security` is what protects the wire; :mod:`codistill.wire.diagnose` says why it kept somebody out.
* :mod:`codistill.process.exit_codes` is how a process of codistill ends.
"""

PROTOCOL_VERSION = 2
"""The version of the contract's behaviour; a worker and a server must speak the same."""

__version__ = "0.1.0"

SESSION_KEY = "codistill-session"
"""The metadata key of ``Exchange`` that holds the session's number, in decimal."""

SUPERSEDED_KEY = "codistill-superseded"
"""The trailing metadata key that is set where ABORTED means that a newer worker took the student over."""
