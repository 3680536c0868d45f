"""Sketches of per-example weight gradients straight from a layer's inputs and cotangents."""
