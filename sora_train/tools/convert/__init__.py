"""`sora ckpt import`, `sora ckpt export`, `sora fetch`: open weights in, open weights out."""
