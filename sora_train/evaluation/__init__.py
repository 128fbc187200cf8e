"""Numbers that judge clips, each with its unit, its direction and where its definition comes from."""
