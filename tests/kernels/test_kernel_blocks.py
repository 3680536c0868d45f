import dataclasses

import pytest

from opus_jax.errors import UserError
from pallas_kernels.generations import LIMITS
from pallas_kernels.ghost_sketch.blocks import Blocks, Work, choose_blocks, cost, vmem_bytes
from pallas_kernels.ghost_sketch.cases import LAYERS


def work(case, **other):
    sizes = Work(case.n, case.t, case.d, case.f, 2, (8, 1024), multiplied=False, scaled=True, aligned=True)
    return dataclasses.replace(sizes, **other)


@pytest.mark.parametrize("generation", LIMITS)
@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_blocks_fit_and_waste_little(generation, case):
    limits = LIMITS[generation]
    blocks = choose_blocks(work(case), generation)
    _, tiles_d, tiles_f, _ = blocks.grid(work(case))
    assert vmem_bytes(work(case), blocks) <= limits.vmem_bytes
    assert max(blocks.d, blocks.f) <= limits.tile
    assert blocks.n * limits.cores <= case.n
    assert tiles_d * blocks.d * tiles_f * blocks.f <= 1.25 * case.d * case.f
    assert case.t % blocks.t == 0


def test_short_examples_share_a_program_and_long_ones_are_cut():
    short, long = (choose_blocks(work(LAYERS[0], t=t, n=64), "v5e") for t in (64, 6144))
    assert short.n == 8
    assert (long.n, long.t) == (1, 3072)


def test_a_length_that_does_not_divide_wastes_less_than_a_register_a_part():
    blocks = choose_blocks(work(LAYERS[0], t=4099), "v5e")
    assert blocks.t == 2064
    assert 0 < 2 * blocks.t - 4099 < 2 * 16


def test_sketches_too_wide_for_large_tiles_make_the_tiles_smaller():
    usual = choose_blocks(work(LAYERS[1]), "v4")
    wide = choose_blocks(work(LAYERS[1], sketch=(8, 160_000)), "v4")
    assert wide.d * wide.f < usual.d * usual.f
    with pytest.raises(UserError, match=r"sketch of 8 x 1000000.*narrower sketch, or 'xla'"):
        choose_blocks(work(LAYERS[1], sketch=(8, 1_000_000)), "v4")


def test_cost_counts_products_and_what_is_read_again():
    sizes = Work(4, 32, 256, 384, 2, (8, 128), multiplied=False, scaled=True, aligned=False)
    counted = cost(sizes, Blocks(2, 32, 128, 128))
    assert counted.flops == 4 * 256 * 384 * (2 * 32 + 1 + 2)
    read = 4 * 32 * 2 * (256 + 384 * 2)  # inputs once, cotangents for both tiles of rows
    assert counted.bytes_accessed == read + 2 * 256 * 384 * 4 + 4 * 8 * 128 * 4
    kron = cost(dataclasses.replace(sizes, multiplied=True, sketch=(16, 128)), Blocks(2, 32, 128, 128))
    assert kron.flops == 4 * 256 * 384 * (2 * 32 + 1 + 2 * 16) + 4 * 2 * 384 * 2 * 16 * 128
