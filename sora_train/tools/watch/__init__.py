"""`sora watch`, `sora report`, `sora track`: a run as it goes, and what is left of it."""
