"""Work counted from the text of compiled programs, against hand counts and the analytic costs."""

import jax
import jax.numpy as jnp
import pytest

from opus_jax.config import from_mapping
from opus_jax.distributed.hlo_costs import convolution_flops, totals, work
from opus_jax.distributed.hlo_text import parse
from opus_jax.models.flops import forward_flops
from opus_jax.training.costs import step_costs
from opus_jax.training.lower_step import workshop

SMALL = {
    "model": {"preset": "tiny", "width": 64, "layers": 3, "heads": 2, "remat": "none"},
    "tokenizer": {"kind": "byte"},
    "corpus": {"row_tokens": 64},
    "batch": {"rows": 4, "microbatch": 2},
    "proxy": {"rows": 4},
    "evaluation": {"batch_rows": 4},
    "selection": {"audit_every": 0, "score_chunk": 4},
}


@pytest.mark.parametrize("step", ["plain", pytest.param("train", marks=pytest.mark.slow)])
def test_scanned_layers_and_chunks_cost_what_the_analytic_count_says(step):
    config = from_mapping(SMALL)
    shop = workshop(config, jax.devices()[:1])
    costs = step_costs(shop.spec, config)
    expected = costs.update + (costs.proxy + costs.direction + costs.scoring if step == "train" else 0)
    counted = totals(getattr(shop, step)().program.compile().as_text())
    assert counted.flops == pytest.approx(expected, rel=0.02)


def test_six_times_parameters_and_tokens():
    """The rule of thumb: attention over 64 tokens, norms and the table of embeddings are what it leaves out."""
    config = from_mapping(SMALL)
    shop = workshop(config, jax.devices()[:1])
    maps = 3 * (4 * 64**2 + 3 * 64 * shop.spec.hidden) + 64 * shop.spec.vocab_size
    attention = 3 * 3 * 2 * 64 * 2 * 64 * 64  # three layers, forward and backward, two products over 64 x 64
    lowered = shop.plain()
    assert lowered.useful_flops == 6 * maps * 64 * 4 + attention * 4
    assert lowered.useful_flops == 3 * 4 * forward_flops(shop.spec, 64)


@pytest.mark.parametrize(
    ("line", "left", "right", "flops"),
    [
        ("f32[128,64]{1,0} convolution(%a, %b), dim_labels=bf_io->bf", (128, 32), (32, 64), 2 * 128 * 32 * 64),
        (  # a product for each of 4 heads, as TPUs write it
            "f32[4,128,256]{2,1,0} convolution(%a, %b), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
            (4, 128, 32), (4, 32, 256), 2 * 4 * 128 * 32 * 256,
        ),
        (  # turned round
            "f32[4,128,256]{2,1,0} convolution(%a, %b), window={size=4 pad=3_3 rhs_reversal=1},dim_labels=bf0_0oi->b0f",
            (128, 32, 1), (4, 256, 32), 2 * 4 * 128 * 32 * 256,
        ),
        (  # a picture: padding is not multiplied
            "f32[1,4,4,8]{3,2,1,0} convolution(%a, %b), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
            (1, 4, 4, 2), (3, 3, 2, 8), 2 * 2 * 8 * 10 * 10,
        ),
    ],
)  # fmt: skip
def test_convolutions_count_the_products_that_are_there(line, left, right, flops):
    (found,) = parse(f"ENTRY %m (a: f32[]) -> f32[] {{\n  ROOT %c = {line}\n}}\n").computations["m"].values()
    assert convolution_flops(found, left, right) == flops


def test_a_slice_of_stacked_layers_is_read_not_the_stack():
    stack, one = 6 * 256 * 256 * 4, 256 * 256 * 4

    def layers(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda y, layer: (jnp.tanh(y @ layer), None), x, w)[0]

    shapes = jax.ShapeDtypeStruct((8, 256), jnp.float32), jax.ShapeDtypeStruct((6, 256, 256), jnp.float32)
    counted = totals(jax.jit(layers).lower(*shapes).compile().as_text())
    assert counted.flops == 2 * 6 * 8 * 256 * 256
    assert stack <= counted.bytes < 4 * stack + 100 * 8 * 256 * 4 < 6 * stack, "all layers, each a few times"
    assert counted.bytes > 6 * one


KERNEL = """HloModule m

%fused (p: f32[8,128], q: f32[1,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0} parameter(0)
  %q = f32[1,128]{1,0} parameter(1)
  %zero = s32[] constant(0)
  ROOT %put = f32[8,128]{1,0} dynamic-update-slice(%p, %q, %zero, %zero)
}

ENTRY %main (x: f32[8,128], y: f32[1,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %y = f32[1,128]{1,0:T(1,128)S(1)} parameter(1)
  %count_sketch.54 = f32[1,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={COST}
  %count_sketch = f32[1,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"body":"TUz"}
  %buffer = f32[9,9]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %f = f32[8,128]{1,0} fusion(%x, %y), kind=kLoop, calls=%fused
}
""".replace("COST", '"cost_estimate":{"flops":"100","transcendentals":"0","bytes_accessed":"40"}')


def test_kernels_count_with_what_they_state_and_updates_in_place_with_what_they_put():
    counted = totals(KERNEL)
    moved = 8 * 128 * 4 + 8 * 4  # of the call without an estimate: its operand and its result
    assert counted.kernels == {"count_sketch": {"calls": 2, "flops": 100, "bytes": 40 + moved}}
    assert counted.flops == 100
    assert counted.bytes == 40 + moved + 128 * 4, "the row put; it comes from VMEM"


def test_higher_precision_goes_over_the_matrix_unit_more_often():
    text = (
        "ENTRY %m (a: f32[8,16], b: f32[16,4]) -> f32[8,4] {\n"
        "  %a = f32[8,16]{1,0} parameter(0)\n  %b = f32[16,4]{1,0} parameter(1)\n"
        "  ROOT %d = f32[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, "
        "operand_precision={highest,highest}\n}\n"
    )
    (found,) = work(text)
    assert (found.flops, found.passes) == (2 * 8 * 16 * 4, 6 * 2 * 8 * 16 * 4)
