"""`sora data` and `sora prep`: what a run would make of its clips, and clips made ready for it."""
