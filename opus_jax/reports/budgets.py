"""What a run had spent at each step, in units that the trainer does not log: seconds and epochs."""

import numpy as np

from opus_jax.data.records import Manifest
from opus_jax.reports.series import EMPTY, Series


def step_seconds(update_tokens: Series, tokens_per_second: Series) -> Series:
    """Seconds in steps so far, without evaluation and saving: tokens since the line before, over the line's speed.

    Exact where every step is logged; where not, each logged step stands for those since the line before.
    """
    if not len(tokens_per_second.steps):
        return EMPTY
    tokens = np.interp(tokens_per_second.steps, update_tokens.steps, update_tokens.values)
    speed = np.where(tokens_per_second.values > 0, tokens_per_second.values, np.inf)
    seconds = np.cumsum(np.diff(tokens, prepend=0.0) / speed)
    return Series(np.append(0, tokens_per_second.steps), np.append(0.0, seconds))


def epochs(seen_tokens: Series, manifest: Manifest) -> Series:
    """Passes of the stream over the training rows: seen tokens over the tokens of all training rows."""
    places = manifest.total_rows("train") * manifest.row_tokens
    tokens = places * (1 - manifest.padding["train"])
    return Series(seen_tokens.steps, seen_tokens.values / tokens) if tokens else EMPTY
