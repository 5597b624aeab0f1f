"""The experiment file: its sections, their checks, and what of it must be the same everywhere."""
