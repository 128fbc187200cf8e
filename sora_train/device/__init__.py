"""What the host and a GPU exchange: copies that neither waits for, locked memory, and a clock of its queue."""
