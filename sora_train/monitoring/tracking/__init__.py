"""Trackers (W&B, TensorBoard), fed from the run folder by a process of their own."""
