"""The page that tells what became of all footage: one HTML file with its numbers, charts and pictures."""
