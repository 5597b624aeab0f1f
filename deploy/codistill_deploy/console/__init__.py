"""The command's output on a terminal: the progress of a run, and tables."""
