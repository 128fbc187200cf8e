"""The embedded default data: a world of moving shapes, their captions and an oracle, made with numpy alone."""
