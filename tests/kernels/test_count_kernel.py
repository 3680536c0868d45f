import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from opus_jax.errors import UserError
from pallas_kernels.count_sketch import tpu
from pallas_kernels.count_sketch.api import count_sketch
from pallas_kernels.count_sketch.cases import SMALL
from pallas_kernels.count_sketch.folding import fold_shape
from pallas_kernels.count_sketch.hashing import buckets

SEED = 5


def matrices(shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
@pytest.mark.parametrize(("shape", "m", "dtype"), SMALL, ids=str)
def test_signed_fold(shape, m, dtype, implementation):
    x = matrices(shape, dtype)
    sketch = jax.jit(lambda x, s: count_sketch(x, s, m, implementation=implementation))(x, jnp.uint32(SEED))
    assert sketch.dtype == jnp.float32
    expected = oracle.folded(np.asarray(x, np.float64), SEED, *fold_shape(*shape[1:], m))
    np.testing.assert_allclose(sketch, expected, atol=3e-5)


def test_hashed_buckets():
    x = matrices((3, 20, 30))
    where = np.asarray(buckets(20, 30, 64, jnp.uint32(SEED))).reshape(-1)
    signed = (np.asarray(x, np.float64) * oracle.sign_matrix(20, 30, SEED)).reshape(3, -1)
    expected = np.stack([np.bincount(where, row, minlength=64) for row in signed])
    np.testing.assert_allclose(count_sketch(x, jnp.uint32(SEED), 64, form="hash"), expected, atol=1e-5)


def test_float64_stays():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 9, 11)))
        sketch = count_sketch(x, jnp.uint32(SEED), 12)
        assert sketch.dtype == jnp.float64
        np.testing.assert_allclose(sketch, oracle.folded(x, SEED, *fold_shape(9, 11, 12)), rtol=1e-13, atol=1e-13)


def test_a_vector_is_the_signed_vector_reshaped_and_summed():
    x = matrices((2, 1, 40))
    signed = np.asarray(x)[:, 0] * oracle.sign_matrix(1, 40, SEED)[0]
    np.testing.assert_allclose(count_sketch(x, jnp.uint32(SEED), 10), signed.reshape(2, -1, 10).sum(axis=1), atol=1e-5)


@pytest.mark.parametrize(
    ("d", "f", "m"), [(1, 30, 64), (30, 30, 1024), (8, 8, 64), (64, 128, 8192), (128, 64, 8192), (3, 100, 512)]
)
def test_what_fits_is_exact(d, f, m):
    rows, columns = fold_shape(d, f, m)
    assert rows * columns == m
    assert rows >= d
    assert columns >= f


@pytest.mark.parametrize(("d", "f"), [(768, 3072), (1600, 6400), (4096, 14336), (50257, 768), (1, 5000), (7, 9001)])
def test_buckets_are_filled_evenly(d, f):
    rows, columns = fold_shape(d, f, 8192)
    fullest = -(-d // rows) * -(-f // columns)
    assert rows * columns == 8192
    assert fullest <= 1.1 * d * f / 8192 + 1


def test_large_layers_fold_to_whole_registers():
    assert fold_shape(768, 3072, 8192) == (8, 1024)
    assert fold_shape(4096, 14336, 8192) == (8, 1024)


def test_mistakes_are_told():
    x, seed = matrices((2, 4, 4)), jnp.uint32(0)
    with pytest.raises(UserError, match=r"m = 0.*at least 1"):
        count_sketch(x, seed, 0)
    with pytest.raises(UserError, match=r"form = 'other'.*stride, hash"):
        count_sketch(x, seed, 4, form="other")
    with pytest.raises(UserError, match="scatter has no TPU kernel; use form 'stride'"):
        count_sketch(x, seed, 4, form="hash", implementation="pallas")
    with jax.enable_x64(True), pytest.raises(UserError, match=r"bfloat16 or float32, not float64; use 'xla'"):
        tpu.stride_sketch(jnp.zeros((1, 2, 2), jnp.float64), seed, 2, 2)


def test_the_kernel_lowers_for_tpu():
    x = jax.ShapeDtypeStruct((16, 1600, 6400), jnp.float32)
    call = jax.jit(lambda x, seed: tpu.stride_sketch(x, seed, 8, 1024))
    exported = jax.export.export(call, platforms=["tpu"])(x, jax.ShapeDtypeStruct((), jnp.uint32))
    assert "tpu_custom_call" in exported.mlir_module()
