"""Comparing methods: which runs there are to be, their running, and the statistics over them."""
