"""What taps report, against every row's own gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from influence.ghost.ghost_models import ROWS, TOKENS, make_case

from opus_jax.config import MeshConfig
from opus_jax.distributed.axes import sharding, tree_shardings
from opus_jax.distributed.mesh import make_mesh
from opus_jax.errors import UserError
from opus_jax.influence.ghost.scores import Pairing, Recording, Sketching, scores
from opus_jax.influence.ghost.shared import gradient_of_rows
from opus_jax.influence.sketch import CountSketch, KronSketch, sketch_tree
from opus_jax.models import parameter_subset, transformer
from opus_jax.models.flops import forward_flops
from opus_jax.models.loss import row_losses
from opus_jax.optim.matrix_preconditioner import Diagonal, Identity

SEED = jnp.uint32(5)
EMBEDDED = ("embedding.embedding", ("lookup",)), ("positions.embedding", ("lookup",))
TIED = ("embedding.embedding", ("lookup", "product")), ("positions.embedding", ("lookup",))


def identity(params):
    return jax.tree.map(lambda _: Identity(), params)


def positive(params):
    """An elementwise preconditioner of every leaf."""
    draw = np.random.default_rng(11)
    return jax.tree.map(lambda x: Diagonal(jnp.asarray(draw.uniform(0.1, 2, x.shape), jnp.float32)), params)


def applied(preconditioners, gradients):
    is_one = lambda x: isinstance(x, Diagonal | Identity)  # noqa: E731
    return jax.tree.map(lambda p, g: p.apply(g), preconditioners, gradients, is_leaf=is_one)


def dense(tree):
    return np.concatenate([np.asarray(x, np.float64).reshape(ROWS, -1) for x in jax.tree.leaves(tree)], axis=1)


def blocks_of(case):
    moving, fixed = parameter_subset.split(case.params, "blocks")
    losses = lambda part, rows: case.losses(parameter_subset.join(part, fixed), rows)  # noqa: E731
    return losses, moving, parameter_subset.split(case.gradients, "blocks")[0]


def close(found, expected, least=0.0):
    """Equal to rounding at the scale of the largest entry, or of `least`."""
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5 * max(np.abs(expected).max(), least))


def test_utilities_are_the_inner_products_of_all_parameters(case):
    found = jax.jit(lambda: scores(case.losses, case.params, case.batch, direction=case.direction, chunk=4))()
    close(
        found.utilities, dense(case.gradients) @ dense(jax.tree.map(lambda v: jnp.stack([v] * ROWS), case.direction))[0]
    )
    close(found.losses, case.losses(case.params, case.batch))


def test_sketches_are_those_of_the_preconditioned_gradients(case):
    """All parameters: tables and heads by lookups and products, gains and biases as they are."""
    sketch = CountSketch(64) if case.spec.tied else KronSketch(blocks=2, side=4)
    preconditioners = positive(case.params)
    sketching = Sketching(sketch, SEED, preconditioners)
    found = jax.jit(lambda: scores(case.losses, case.params, case.batch, sketching=sketching).sketches)()
    moved = applied(preconditioners, case.gradients)
    expected = np.asarray(sketch_tree(sketch, moved, SEED))
    assert found.shape == expected.shape
    close(found, expected)


@pytest.mark.parametrize(("make", "both_sides"), [(identity, False), (positive, False), (positive, True)])
def test_pairs_are_exact(plain, make, both_sides):
    losses, moving, gradients = blocks_of(plain)
    preconditioners = make(moving)
    pairing = Pairing(preconditioners, both_sides)
    found = jax.jit(lambda: scores(losses, moving, plain.batch, pairing=pairing).gram)()
    moved = dense(applied(preconditioners, gradients))
    close(found, moved @ (moved if both_sides else dense(gradients)).T)


def test_factors_give_the_ordinary_gradient_of_the_chosen_rows(case):
    uses = TIED if case.spec.tied else EMBEDDED
    recording = Recording(TOKENS, "float32", uses)
    weights, chosen = jnp.arange(1.0, ROWS + 1), jnp.array([1, 4, 6])

    def by_factors():
        found = scores(case.losses, case.params, case.batch, recording=recording)
        return gradient_of_rows(case.params, found.factors, weights, chosen)

    def ordinary(params):
        return jnp.sum((weights * case.losses(params, case.batch))[chosen])

    found, expected = jax.jit(by_factors)(), jax.jit(jax.grad(ordinary))(case.params)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))  # a key's bias has no gradient at all
    jax.tree.map(lambda a, b: close(a, np.asarray(b), least=scale / 100), found, expected)


def test_a_mesh_changes_nothing(plain):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
    shardings = tree_shardings(mesh, transformer.logical_axes(plain.spec), plain.params)
    params = jax.device_put(plain.params, shardings)
    rows = {name: jax.device_put(x, sharding(mesh, ("batch", None))) for name, x in plain.batch.items()}

    def run(params, rows):
        sketching = Sketching(KronSketch(blocks=2, side=4), SEED, positive(plain.params))
        return scores(plain.losses, params, rows, direction=plain.direction, sketching=sketching)

    ask = lambda params, rows: (lambda s: (s.utilities, s.sketches))(run(params, rows))  # noqa: E731
    alone = jax.jit(ask)(plain.params, plain.batch)
    with jax.set_mesh(mesh):
        together = jax.jit(ask)(params, rows)
    for a, b in zip(together, alone, strict=True):
        close(a, np.asarray(b))


def test_no_weight_gradient_is_computed():
    """Compiled arithmetic: two forward passes and the sketches; a gradient takes three."""
    case = make_case(preset="llama2-1b", layers=1, width=64, hidden=128, heads=2)
    losses, moving, _ = blocks_of(case)
    sketching = Sketching(KronSketch(blocks=1, side=4), SEED, identity(moving))
    flops = lambda f, *x: jax.jit(f).lower(*x).compile().cost_analysis()["flops"]  # noqa: E731
    forward = flops(lambda p, b: losses(p, b).sum(), moving, case.batch)
    gradient = flops(jax.grad(lambda p, b: losses(p, b).sum()), moving, case.batch)
    ghost = flops(lambda p, b: scores(losses, p, b, sketching=sketching).sketches, moving, case.batch)
    assert forward > 0.9 * ROWS * forward_flops(case.spec, TOKENS)
    assert gradient > 2.6 * forward
    assert ghost < 2.25 * forward


def test_a_matrix_that_is_not_tapped_is_named(plain):
    def untapped(params, batch):
        return row_losses(plain.spec, params, batch) + jnp.sum(params["head"]["kernel"] * 2)

    with pytest.raises(UserError, match=r"head\.kernel.*tapped"):
        scores(untapped, plain.params, plain.batch, direction=plain.direction)


def test_pairs_do_not_come_in_chunks(plain):
    with pytest.raises(ValueError, match="all rows at once"):
        scores(plain.losses, plain.params, plain.batch, pairing=Pairing(identity(plain.params)), chunk=4)


def test_a_row_does_not_touch_the_others(plain):
    """Permuted rows give permuted answers."""
    order = jnp.asarray(np.random.default_rng(0).permutation(ROWS))
    ask = jax.jit(lambda rows: scores(plain.losses, plain.params, rows, direction=plain.direction).utilities)
    shuffled = {name: x[order] for name, x in plain.batch.items()}
    close(ask(shuffled), np.asarray(ask(plain.batch))[order])
