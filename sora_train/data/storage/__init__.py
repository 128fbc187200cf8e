"""Byte ranges of files, here or behind an address: retried, cached on disk, and checked."""
