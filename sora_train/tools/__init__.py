"""The sub-commands of `sora`, a folder a verb: command.py reads the arguments, the work lies beside it."""
