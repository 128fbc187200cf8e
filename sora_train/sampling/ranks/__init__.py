"""Several processes that sample together: which does what, and how it is shared out without the model's knowledge."""
