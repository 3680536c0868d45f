"""opus_jax: train language models on the data that moves them most."""
