"""This process among its peers: ranks, the control plane, deadlines, preemption."""
