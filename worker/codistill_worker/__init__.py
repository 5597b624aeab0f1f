"""The worker of codistill: trains one student.

* :mod:`codistill_worker.trainer` is one training step, in two halves around the exchange.
* :mod:`codistill_worker.learner` is a student's whole course: rounds, evaluations, checkpoints, reports.
* :mod:`codistill_worker.objectives` holds the methods' worker halves, which turn targets into a loss.
* :mod:`codistill_worker.exchange` is what outputs travel through, :mod:`codistill_worker.client` that over gRPC.
* :mod:`codistill_worker.randomness` and :mod:`codistill_worker.augmentation` draw without state.
* :mod:`codistill_worker.data`, :mod:`codistill_worker.models` and :mod:`codistill_worker.checkpoints` are what they say.
* :mod:`codistill_worker.app` runs it all as a process.
"""
