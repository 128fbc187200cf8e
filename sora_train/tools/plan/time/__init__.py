"""The time of a step and of a run: work, links, failures, from published rates and measurements."""
