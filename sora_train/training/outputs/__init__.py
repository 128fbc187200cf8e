"""What a run leaves behind: samples, scores, pictures of steps, the exported autoencoder, the summary."""
