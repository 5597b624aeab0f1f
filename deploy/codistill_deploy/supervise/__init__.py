"""Keep the processes of a run alive: started, watched, restarted, and ended together."""
