"""Taking part in a run: the session with a server, and the order of the samples."""
