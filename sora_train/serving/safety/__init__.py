"""What a server makes and what it refuses: rules for prompts, checks of what is uploaded, of what came out, and why."""
