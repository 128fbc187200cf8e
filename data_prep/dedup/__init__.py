"""Finding clips that show the same: small volumes of gray compared after they are laid onto each other."""
