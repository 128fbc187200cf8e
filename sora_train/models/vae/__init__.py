"""The video autoencoder: diffusers' AutoencoderKLWan, streamed, initialised and measured."""
