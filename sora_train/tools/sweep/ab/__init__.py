"""Two configurations trained as a pair, until it is clear which is better."""
