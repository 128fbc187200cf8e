"""A durable `/v1/videos`: jobs that survive, any backend that makes the videos, keys, safety and provenance."""
