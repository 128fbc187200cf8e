"""Low-rank adapters of the transformer's linear layers: what they are, and the files that hold them."""
