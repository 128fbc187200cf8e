"""Prepares training data before any run: folders of clips with captions become shards with a manifest."""
