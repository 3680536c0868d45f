"""Signed fold of gradients: CountSketch with signs computed on the fly."""
