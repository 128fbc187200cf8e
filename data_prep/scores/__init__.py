"""What a clip is like, in numbers: each file measures one idea on the frames of one pass."""
