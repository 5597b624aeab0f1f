"""The journal of closed rounds, and a round in bytes."""
