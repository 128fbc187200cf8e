"""Adapters as single safetensors files, in the layouts that other tools write and read."""
