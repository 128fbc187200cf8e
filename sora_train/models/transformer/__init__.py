"""The video DiT, with the parameter names of diffusers' WanTransformer3DModel."""
