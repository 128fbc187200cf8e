"""Parts of benchmarks/gpu_suite.sh that are no sub-command of `sora bench`; each writes as it goes."""
