"""What makes the videos of jobs: our own sampler, or a server elsewhere."""
