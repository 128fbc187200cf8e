"""`sora sample`: clips from a checkpoint."""
