"""The examination of many nodes at once, each rank beside its peers, and never a hang."""
