"""What the host and a GPU exchange: copies that neither waits for, locked memory; a clock, and repeated timing."""
