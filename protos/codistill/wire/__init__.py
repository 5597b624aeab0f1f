"""The bytes on the network: tensors, checksums, TLS and tokens."""
