"""`sora launch`: one frozen configuration, started here, on SLURM or on Kubernetes."""
