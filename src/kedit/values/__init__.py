"""The optimisation of values, and the forward passes under it."""
