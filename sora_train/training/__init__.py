"""The training loop and all it holds: the Trainer, its parts, its state."""
