"""The HTTP of `/v1/videos`: what requests may hold, and what is answered, as OpenAI's clients know it."""
