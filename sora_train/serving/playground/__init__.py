"""The page at `/`: a client of /v1/videos for people, without a build step and without anything from elsewhere."""
