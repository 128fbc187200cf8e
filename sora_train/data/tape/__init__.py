"""The tape: the sequence of micro-batches that a run trains on, a pure function of manifest, buckets and seed."""
