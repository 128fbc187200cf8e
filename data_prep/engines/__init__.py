"""Who calls the stages, processes of this machine or a Ray cluster, while the ledger is the truth in both."""
