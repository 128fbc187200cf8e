"""The sections of the configuration, one file a section: every key with its type, default and meaning."""
