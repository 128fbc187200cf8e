"""What the runs of a sweep say together: tables, paired differences, a page."""
