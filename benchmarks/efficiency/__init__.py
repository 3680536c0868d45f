"""The parts of the data_efficiency benchmark: mixes, arms, runs, tuning and ratios."""
