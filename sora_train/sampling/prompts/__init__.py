"""What a video is to show: prompts of text or fields, storyboards, and what is made of them."""
