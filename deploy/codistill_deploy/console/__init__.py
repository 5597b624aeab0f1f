"""What the command shows on a terminal: the progress of a run, and tables."""
