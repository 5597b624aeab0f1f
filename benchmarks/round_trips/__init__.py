"""The round trips that exchange.py measures: by processes of codistill and gloo, and by actors of Ray."""
