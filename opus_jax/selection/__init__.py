"""Which rows of the candidate buffer are trained on."""

from opus_jax.selection import baselines, opus

METHODS = {
    "opus": opus.select,
    "random": baselines.random,
    "high_loss": baselines.high_loss,
    "none": baselines.none,
}
