"""The journal of closed rounds, and what a round is in bytes."""
