"""From a checkpoint to clips: the sampler's pipeline, the operations, files, and `sora_train.load`."""
