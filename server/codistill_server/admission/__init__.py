"""The checks of a message, before anything in it is used."""
