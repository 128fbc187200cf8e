"""Questions with a known answer: each probe asks a model for clips and measures a law that they must obey."""
