"""The text encoders: a small one of our own training, and published ones."""
