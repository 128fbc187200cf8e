"""Who calls the stages: processes of this machine, or a Ray cluster. The ledger is the truth in both."""
