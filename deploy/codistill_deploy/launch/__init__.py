"""Starting a run: with processes on this machine, in one process, or on a Ray cluster."""
