"""What a run leaves on disk: every path, lock and file format, once."""
