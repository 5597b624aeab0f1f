"""Comparing methods: the plan of the runs, the runs themselves, and the statistics over them."""
