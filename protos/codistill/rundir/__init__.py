"""A run on disk: every path, lock and file format, once."""
