"""The embedded default data: a world of moving shapes, their captions, and an oracle. It needs numpy alone."""
