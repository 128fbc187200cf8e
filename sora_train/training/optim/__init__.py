"""Optimizers, learning rates and the averages of the weights."""
