"""The coordinator on gRPC: service, stream, requests and statuses; tokens and quotas; the server and its port."""
