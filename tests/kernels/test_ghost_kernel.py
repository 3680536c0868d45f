import inspect

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from opus_jax.errors import UserError
from pallas_kernels.count_sketch.api import count_sketch
from pallas_kernels.count_sketch.folding import fold_shape
from pallas_kernels.ghost_sketch import reference, tpu
from pallas_kernels.ghost_sketch.api import CountFold, KronFold, ghost_sketch
from pallas_kernels.ghost_sketch.cases import SMALL, Case, numbers
from pallas_kernels.implementation import pallas_interpret

SEED = 5
CASES = {case.name: case for case in SMALL}
COUNT = {"attention": (8, 128), "ragged": (10, 25), "tokens_in_parts": (16, 256)}  # aligned, unaligned, wider than tile


def folds(case, kind, dtype=jnp.float32):
    """A fold for this case, and the same on float64 matrices."""
    if kind == "count":
        rows, columns = COUNT.get(case.name, (4, 6))
        return CountFold(jnp.uint32(SEED), rows, columns), lambda s: oracle.folded(s, SEED, rows, columns)
    left, right = oracle.factors(case.d, case.f)
    return KronFold(jnp.asarray(left, dtype), jnp.asarray(right, dtype)), lambda s: oracle.two_sided(s, left, right)


def compare(case, kind, scaled, aligned, run, *, tolerance=None):
    data = numbers(case)
    fold, exactly = folds(case, kind)
    arrays = {name: jnp.asarray(x, case.dtype if x.ndim == 3 else "float32") for name, x in data.items()}
    scale, direction = arrays["scale"] if scaled else None, arrays["direction"] if aligned else None
    sketch, alignment = jax.jit(run)(arrays["inputs"], arrays["cotangents"], fold, scale, direction)
    gradient = oracle.gradients(data["inputs"], data["cotangents"])
    expected = exactly(gradient * data["scale"] if scaled else gradient)
    assert sketch.dtype == jnp.float32
    np.testing.assert_allclose(sketch, expected, atol=(tolerance or 2e-6) * np.abs(expected).max())
    if aligned:
        inner = np.sum(gradient * data["direction"], axis=(1, 2))
        np.testing.assert_allclose(alignment, inner, atol=1e-5 * np.linalg.norm(gradient) * 10)
    else:
        assert alignment is None


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("kind", ["count", "kron"])
def test_reference(kind, scaled, aligned):
    compare(CASES["ragged"], kind, scaled, aligned, reference.ghost_sketch)


@pytest.mark.parametrize(
    ("name", "kind", "scaled", "aligned"),
    [
        ("attention", "count", True, True),
        ("attention", "kron", True, True),
        ("ragged", "count", False, False),
        ("ragged", "kron", False, True),
        ("tokens_in_parts", "count", True, True),
        ("tokens_in_parts", "kron", True, False),
    ],
)
def test_kernel(name, kind, scaled, aligned):
    """Under the interpreter memory never written is NaN, so what a block holds past an edge must not come in."""
    case = CASES[name]
    kernel = lambda *a: tpu.ghost_sketch(*a, interpret=pallas_interpret("interpret"), blocks=case.blocks)  # noqa: E731
    rounded = kind == "kron" and case.dtype == "bfloat16"  # the scaled tile is rounded before its products
    compare(case, kind, scaled, aligned, kernel, tolerance=4e-3 if rounded else None)


def test_a_few_gradients_at_a_time_are_all_gradients(monkeypatch):
    monkeypatch.setattr(reference, "GRADIENT_BYTES", 2 * 24 * 40 * 4)
    compare(Case("five", 5, 6, 24, 40), "count", True, True, reference.ghost_sketch)
    case, fold = Case("many", 64, 6, 24, 40), CountFold(jnp.uint32(0), 8, 8)
    shapes = [jax.ShapeDtypeStruct((case.n, case.t, size), jnp.float32) for size in (case.d, case.f)]
    run = jax.jit(lambda a, b: reference.ghost_sketch(a, b, fold, None, None)[0])
    assert run.lower(*shapes).compile().memory_analysis().temp_size_in_bytes < case.n * case.d * case.f * 4 / 4


def test_a_kron_fold_without_scale_forms_no_gradient():
    shapes = [jax.ShapeDtypeStruct((4, 6, size), jnp.float32) for size in (240, 400)]
    fold, _ = folds(Case("wide", 4, 6, 240, 400), "kron")
    run = jax.jit(lambda a, b: ghost_sketch(a, b, fold)[0])
    assert ",240,400]" not in run.lower(*shapes).compile().as_text()


def test_float64_stays():
    case = Case("small", 2, 5, 7, 9, "float64")
    with jax.enable_x64(True):
        data = {name: jnp.asarray(x) for name, x in numbers(case).items()}
        gradient = oracle.gradients(data["inputs"], data["cotangents"])
        for kind in ("count", "kron"):
            fold, exactly = folds(case, kind, jnp.float64)
            for scale in (None, data["scale"]):
                sketch, aligned = ghost_sketch(
                    data["inputs"], data["cotangents"], fold, scale=scale, direction=data["direction"]
                )
                assert sketch.dtype == aligned.dtype == jnp.float64
                want = exactly(gradient if scale is None else gradient * data["scale"])
                np.testing.assert_allclose(sketch, want, rtol=1e-12, atol=1e-12)
                inner = np.sum(gradient * data["direction"], axis=(1, 2))
                np.testing.assert_allclose(aligned, inner, rtol=1e-12)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_a_count_fold_is_the_count_sketch_of_the_scaled_gradient(implementation):
    """Small integers, whose sums are exact in any order: not one bit differs."""
    random, case = np.random.default_rng(3), Case("exact", 2, 8, 40, 130)
    tokens = [jnp.asarray(random.integers(-3, 4, (2, 8, size)), jnp.float32) for size in (case.d, case.f)]
    scale = jnp.asarray(2.0 ** random.integers(-3, 3, (case.d, case.f)), jnp.float32)
    gradient = jnp.einsum("ntd,ntf->ndf", *tokens)
    fold = CountFold(jnp.uint32(SEED), *fold_shape(case.d, case.f, 256))
    sketch, _ = ghost_sketch(*tokens, fold, scale=scale, implementation=implementation)
    np.testing.assert_array_equal(sketch, count_sketch(scale * gradient, jnp.uint32(SEED), 256))


def test_mistakes_are_told():
    call = inspect.unwrap(ghost_sketch)  # as a user calls it, without the tests' own check of shapes
    a, b, fold = jnp.zeros((2, 3, 4)), jnp.zeros((2, 3, 5)), CountFold(jnp.uint32(0), 2, 2)
    with pytest.raises(UserError, match="must share examples and tokens"):
        call(a, jnp.zeros((2, 4, 5)), fold)
    with pytest.raises(UserError, match="inputs are float32, cotangents bfloat16"):
        call(a, b.astype(jnp.bfloat16), fold)
    with pytest.raises(UserError, match=r"scale has shape \(5, 4\).*\(4, 5\)"):
        call(a, b, fold, scale=jnp.zeros((5, 4)))
    with pytest.raises(UserError, match="CountFold of 0 x 2"):
        call(a, b, CountFold(jnp.uint32(0), 0, 2))
    with pytest.raises(UserError, match=r"KronFold of .* must be \[R, 4, p\]"):
        call(a, b, KronFold(jnp.zeros((1, 5, 2)), jnp.zeros((1, 5, 2))))
    with pytest.raises(UserError, match="takes bfloat16 or float32, not float16"):
        tpu.ghost_sketch(a.astype(jnp.float16), b.astype(jnp.float16), fold, None, None)


@pytest.mark.parametrize("kind", ["count", "kron"])
def test_the_kernel_lowers_for_tpu(kind):
    case = Case("gpt2_mlp", 16, 512, 768, 3072, "bfloat16")
    fold, _ = folds(case, kind)
    shapes = [jax.ShapeDtypeStruct((case.n, case.t, size), jnp.bfloat16) for size in (case.d, case.f)]
    scale = jax.ShapeDtypeStruct((case.d, case.f), jnp.float32)
    call = jax.jit(lambda a, b, s: tpu.ghost_sketch(a, b, fold, s, None)[0])
    assert "tpu_custom_call" in jax.export.export(call, platforms=["tpu"])(*shapes, scale).mlir_module()
