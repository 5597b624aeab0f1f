"""What every process of codistill shares: exit codes, a watchdog, and the loading of code that an experiment names."""
