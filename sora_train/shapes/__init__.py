"""The embedded default data: a world of moving shapes, its captions, and an oracle that reads it."""
