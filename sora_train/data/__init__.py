"""From a source of clips to the batches of a step: manifest, buckets, tape, decoding; no torch here."""
