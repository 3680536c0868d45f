"""From tokens, from a lookup, and from the gradient itself: one sketch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opus_jax.config import MeshConfig
from opus_jax.distributed.mesh import make_mesh
from opus_jax.errors import UserError
from opus_jax.influence.sketch import CountSketch, KronSketch, TensorSketch
from opus_jax.influence.sketch.family import Sketch
from opus_jax.optim.matrix_preconditioner import Diagonal, Identity
from tests.influence.sketch.sketched import drawn, preconditioners, tokens

FAMILIES = {"count": CountSketch(60), "kron": KronSketch(2, 5), "tensor": TensorSketch(51)}
FORMS = ("identity", "diagonal", "factored", "output_side")
SEED = jnp.uint32(3)
LARGE, FITTING, VECTOR = (13, 11), (6, 7), (1, 70)


def supported(shape):
    pairs = [(family, form) for family in FAMILIES for form in FORMS]
    return [(*pair, shape) for pair in pairs if pair[0] != "tensor" or pair[1] in ("identity", "factored")]


@pytest.mark.parametrize(("family", "form", "shape"), supported(LARGE) + supported(FITTING) + supported(VECTOR))
def test_tokens_give_the_gradients_sketch(family, form, shape):
    sketch = FAMILIES[family]
    assert isinstance(sketch, Sketch)
    with jax.enable_x64(True):
        a, b, gradient = tokens(3, 7, *shape)
        preconditioner = preconditioners(*shape)[form]
        expected = sketch.of_gradient(preconditioner.apply(jnp.asarray(gradient)), SEED)
        found = sketch.of_tokens(jnp.asarray(a), jnp.asarray(b), SEED, preconditioner)
        assert found.shape == (3, sketch.width)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize(("family", "form", "shape"), supported(LARGE) + supported(FITTING))
def test_a_lookup_gives_the_gradients_sketch(family, form, shape):
    sketch, (height, width) = FAMILIES[family], shape
    ids = np.random.default_rng(5).integers(0, height, (3, 9))
    ids[0, :4] = height - 1  # a row used several times, and the last
    with jax.enable_x64(True):
        cotangents = drawn(6, 3, 9, width)
        gradient = np.einsum("ntd,ntf->ndf", np.eye(height)[ids], cotangents)
        preconditioner = preconditioners(*shape)[form]
        expected = sketch.of_gradient(preconditioner.apply(jnp.asarray(gradient)), SEED)
        found = sketch.of_lookup(jnp.asarray(ids), jnp.asarray(cotangents), SEED, preconditioner, height=height)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_is_linear_and_a_seed_is_a_hash(family):
    sketch = FAMILIES[family]
    x, y = (jnp.asarray(drawn(seed, 2, *LARGE), jnp.float32) for seed in (0, 1))
    of = jax.jit(sketch.of_gradient)
    both = of(2 * x - y, SEED)
    np.testing.assert_allclose(both, 2 * of(x, SEED) - of(y, SEED), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(both, of(2 * x - y, SEED))
    assert np.abs(of(x, SEED) - of(x, jnp.uint32(4))).max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_half_width_activations_are_summed_in_float32(family):
    a, b, _ = tokens(2, 7, *LARGE)
    a, b = jnp.asarray(a, jnp.bfloat16), jnp.asarray(b, jnp.bfloat16)
    of = jax.jit(partial(FAMILIES[family].of_tokens, seed=SEED, preconditioner=Identity()))
    exact = of(a.astype(jnp.float32), b.astype(jnp.float32))
    for cotangents in (b, b.astype(jnp.float32)):  # a head hands back float32
        found = of(a, cotangents)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, exact, rtol=0.02, atol=0.02 * np.abs(exact).max())


@pytest.mark.parametrize(
    ("family", "form"), [("count", "diagonal"), ("count", "factored"), ("kron", "diagonal"), ("tensor", "factored")]
)
def test_many_devices_give_the_same(family, form):
    sketch, shape, axes = FAMILIES[family], (13, 12), (None, "tensor")
    preconditioner = preconditioners(*shape)[form]
    a, b, gradient = (jnp.asarray(x, jnp.float32) for x in tokens(8, 7, *shape))
    seen = lambda a, b: sketch.of_tokens(a, b, SEED, preconditioner, axes=axes)  # noqa: E731
    proxy = lambda g: sketch.of_gradient(g, SEED, axes=axes)  # noqa: E731
    expected = jax.jit(seen)(a, b), jax.jit(proxy)(gradient[:1])
    with jax.set_mesh(make_mesh(MeshConfig(data=4, tensor=2))):
        found = jax.jit(seen)(a, b), jax.jit(proxy)(gradient[:1])  # one proxy for four shards
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("family", ["count", "kron"])
def test_the_tpu_kernel_gives_the_same(family):
    preconditioner = preconditioners(*LARGE)["diagonal"]
    a, b, _ = (jnp.asarray(x, jnp.float32) for x in tokens(2, 7, *LARGE))
    of = lambda how: FAMILIES[family].of_tokens(a, b, SEED, preconditioner, implementation=how)  # noqa: E731
    expected = of("xla")
    np.testing.assert_allclose(of("interpret"), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("form", ["diagonal", "output_side"])
def test_a_tensor_sketch_says_what_to_use_instead(form):
    a, b, _ = (jnp.asarray(x, jnp.float32) for x in tokens(2, 3, *LARGE))
    with pytest.raises(UserError, match="use KronSketch or CountSketch"):
        TensorSketch(51).of_tokens(a, b, SEED, preconditioners(*LARGE)[form])
    with pytest.raises(UserError, match="use KronSketch or CountSketch"):
        TensorSketch(51).of_lookup(jnp.zeros((2, 3), int), b, SEED, preconditioners(*LARGE)[form], height=13)


def test_a_hashed_sketch_wants_gradients():
    a, b, _ = (jnp.asarray(x, jnp.float32) for x in tokens(2, 3, *LARGE))
    with pytest.raises(UserError, match="use form = 'stride'"):
        CountSketch(60, "hash").of_tokens(a, b, SEED, Identity())


@pytest.mark.parametrize("family", ["count", "kron"])
def test_the_gradient_of_few_rows_exists_at_a_time(family, monkeypatch):
    """The compiler's own count of temporary memory against all gradients, P being elementwise."""
    monkeypatch.setattr("pallas_kernels.ghost_sketch.reference.GRADIENT_BYTES", 2**17)  # two of 32 gradients
    a, b, scale = jnp.zeros((32, 4, 128)), jnp.zeros((32, 4, 128)), jnp.ones((128, 128))
    seen = jax.jit(lambda a, b, scale: FAMILIES[family].of_tokens(a, b, SEED, Diagonal(scale)))
    assert seen.lower(a, b, scale).compile().memory_analysis().temp_size_in_bytes < 32 * 128 * 128 * 4 / 3
