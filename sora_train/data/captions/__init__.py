"""From tables and text files to the caption of each clip, and which of several a sample is trained with."""
