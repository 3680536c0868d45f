"""Kernels under per-example gradient sketches: one package per kernel, each with an XLA form that runs everywhere.

`api` is what callers import; `reference` is the XLA form; `tpu` the Pallas kernel; `cases` the shapes that tests and
benchmarks share.
"""
