"""Who may ask for how much, what it costs, and what was done: keys, limits, prices and the audit log."""
