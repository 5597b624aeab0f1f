"""The worker of codistill: trains one student.

* :mod:`codistill_worker.training.trainer` is one training step, in two halves around the exchange.
* :mod:`codistill_worker.student` is a student's whole course: rounds, evaluations, checkpoints, reports.
* :mod:`codistill_worker.methods` holds the methods' worker halves, which turn targets into a loss.
* :mod:`codistill.peer.base` is what outputs travel through, :mod:`codistill.peer.grpc` that over gRPC.
* :mod:`codistill_worker.randomness` and :mod:`codistill_worker.data.augmentation` draw without state.
* :mod:`codistill_worker.data`, :mod:`codistill_worker.models` and :mod:`codistill_worker.training.checkpoints` are what they say.
* :mod:`codistill_worker.app` runs it all as a process.
"""
