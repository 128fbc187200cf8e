"""Whether ranks do the same: the self-test at the start, and the comparisons of debug mode."""
