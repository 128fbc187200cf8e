"""The verbs of serving: `sora serve` with its keys, and `sora verify`."""
