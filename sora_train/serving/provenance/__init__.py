"""Where a video comes from: C2PA manifests that are signed and read, and an invisible mark in its frames."""
