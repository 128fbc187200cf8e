"""What `sora doctor` looks at, a theme a file: a reading of this machine, and a pure judgement of it."""
