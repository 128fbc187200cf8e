"""Reading sources and clips: frames with their times, without holding more than a few."""
