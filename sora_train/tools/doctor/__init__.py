"""`sora doctor`: whether machines, network, storage and code are fit to train."""
