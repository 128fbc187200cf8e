"""One model over many ranks: degrees and mesh, the FSDP and DeepSpeed engines, context parallelism, memory options."""
