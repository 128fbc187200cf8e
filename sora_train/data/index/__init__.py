"""From folders, shards and tables to a manifest: one row a clip, with what is in it and why it is unusable."""
