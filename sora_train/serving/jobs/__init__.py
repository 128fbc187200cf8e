"""Jobs of `sora serve` in a database, the workers that lease them, their files, and the news that is sent of them."""
