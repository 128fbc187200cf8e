"""Captions of clips, from an endpoint or a local model by a schema, within a budget, checked against scores."""
