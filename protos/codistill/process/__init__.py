"""Shared by every process of codistill: exit codes, a watchdog, and the loading of code that an experiment names."""
