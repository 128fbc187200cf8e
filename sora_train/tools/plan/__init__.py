"""`sora plan` and `sora models`: memory, speed and cost of a run before it starts."""
