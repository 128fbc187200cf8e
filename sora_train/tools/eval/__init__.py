"""`sora eval`: numbers that judge a run, or a folder of clips, and the clips behind each number."""
