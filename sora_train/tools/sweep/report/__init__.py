"""The report of a sweep: tables, paired differences, a page."""
