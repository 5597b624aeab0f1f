"""What crosses the network: tensors, checksums, TLS and tokens."""
