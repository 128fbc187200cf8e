"""The networks (transformer, video autoencoder, text encoders) and their FLOPs, none of which knows its rank."""
