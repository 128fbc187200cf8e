"""Whether this machine and this code train the same numbers in every layout: `sora doctor parallel|parity`."""
