"""Going on after whatever happens: resume, roll-back, spikes, out of memory, debug mode."""
