"""`sora config` and `sora init`: what a configuration means, and the start of a project."""
