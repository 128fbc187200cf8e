"""Frozen weights of blocks in fewer bits, as plain tensors of bytes that every engine can move and divide."""
