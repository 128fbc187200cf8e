"""This process among its peers: ranks, the control plane, deadlines, notices to leave."""
