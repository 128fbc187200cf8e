"""Memory for time: recomputed or offloaded activations, the optimizer on the host; products in float8."""
