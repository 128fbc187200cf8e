"""Measurements that carry their machine, commit and command: `sora bench`, one file a subject."""
