"""One training step of a student, its optimiser, its evaluation and its checkpoints."""
