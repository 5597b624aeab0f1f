"""Keeping the processes of a run alive: started, watched, started again, and ended together."""
