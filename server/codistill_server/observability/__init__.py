"""The state of a run, for Prometheus and for a browser."""
