"""The run folder, and what is written into it and read from it: metrics, events, goodput, the state of a run."""
