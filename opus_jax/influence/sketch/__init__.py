"""Sketches of per-example gradients: a few thousand numbers per matrix whose inner products are the gradients'."""

from opus_jax.influence.sketch.count import CountSketch
from opus_jax.influence.sketch.family import Sketch
from opus_jax.influence.sketch.kron import KronSketch
from opus_jax.influence.sketch.tensor import TensorSketch
from opus_jax.influence.sketch.tree import make_sketch, sketch, sketch_tree

__all__ = ["CountSketch", "KronSketch", "Sketch", "TensorSketch", "make_sketch", "sketch", "sketch_tree"]
