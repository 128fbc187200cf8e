"""Videos longer than a model's clips: windows one after another, each shown the end of the one before."""
