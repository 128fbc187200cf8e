"""`sora replay`: a step of a run rebuilt on one machine."""
