"""What makes the round trips that exchange.py measures: processes of codistill and gloo, and actors of Ray."""
