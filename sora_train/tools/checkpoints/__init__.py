"""`sora ckpt`: look at checkpoints, compare them, and make other things of them."""
