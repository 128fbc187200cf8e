"""Latents and text embeddings that are made once: stored in shards or cached, with what they were made with."""
