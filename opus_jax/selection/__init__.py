"""Which rows of the candidate buffer are trained on, and what the stream offers next."""

from opus_jax.selection import baselines, opus

METHODS = {
    "opus": opus.select,
    "random": baselines.random,
    "high_loss": baselines.high_loss,
    "mid_loss": baselines.mid_loss,
    "none": baselines.none,
}
