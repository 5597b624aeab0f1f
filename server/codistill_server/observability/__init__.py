"""Where a run stands, shown to Prometheus and to a browser."""
