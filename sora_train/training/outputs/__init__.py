"""What a run tells and leaves behind: metrics, checkpoints, samples, scores, pictures of steps, the summary."""
