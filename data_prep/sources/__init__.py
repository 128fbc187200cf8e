"""What an input may be, a folder, a list, a table, an address or another curator's output, as one list of sources."""
