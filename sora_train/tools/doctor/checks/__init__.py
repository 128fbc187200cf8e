"""The checks of `sora doctor`, a theme a file: each reads this machine, and judges the reading in a pure function."""
