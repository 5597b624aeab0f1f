"""The worker of codistill: trains one student, or runs one teacher.

* :mod:`.app` runs a worker as a process.
* :mod:`.student` and :mod:`.teacher` are the loops of steps, evaluations, checkpoints and reports;
  :mod:`.participant` is their common part.
* :mod:`.training` has the training step, the optimiser, evaluation, weights and checkpoints.
* :mod:`.methods` turns a method's targets into a loss.
* :mod:`.data` and :mod:`.models` are loaded and built from the experiment.
"""
