"""Context parallelism: one clip's tokens over several ranks, by Ulysses, by ring, or both."""
