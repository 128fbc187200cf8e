"""What a run trains on, assembled: sources, tape, loader, latents, held-out clips."""
