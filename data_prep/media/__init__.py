"""Reading sources and clips: frames with their times, at the size that is asked for, without holding more than a few."""
