"""What every room may import: draws keyed by name, files written whole, progress bars, the version of the code."""
