"""Rectified flow and its sampler, in torch alone: path, timesteps, guidance, conditions, the spec of a checkpoint."""
