"""Shapes of the count sketch that tests share: [N, D, F], m, type."""

SMALL = (
    ((3, 20, 300), 96, "float32"),
    ((2, 1, 500), 64, "float32"),
    ((9, 40, 1100), 2048, "bfloat16"),
    ((1, 24, 130), 1000, "float32"),
)
