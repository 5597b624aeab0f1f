"""Taking part in a run from any training loop: the transport, the session with a server, and the order of the samples."""
