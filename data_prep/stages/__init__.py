"""The stages, a file each: a function over rows, its section of settings, its columns."""
