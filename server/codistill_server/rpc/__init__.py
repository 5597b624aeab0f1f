"""The coordinator on gRPC."""
