"""A participant's training: its step, its optimiser, its evaluation, its weights and checkpoints."""
