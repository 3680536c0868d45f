import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from opus_jax.distributed.mesh import AXES
from opus_jax.errors import UserError
from pallas_kernels.count_sketch.api import count_sketch
from pallas_kernels.ghost_sketch.api import CountFold, KronFold, ghost_sketch

N, T, D, F = 8, 6, 24, 40
RANDOM = np.random.default_rng(0)
A, B = (jnp.asarray(RANDOM.normal(size=(N, T, size)), jnp.float32) for size in (D, F))
SCALE, DIRECTION = (jnp.asarray(RANDOM.normal(size=(D, F)), jnp.float32) for _ in range(2))
COUNT = CountFold(jnp.uint32(3), 5, 7)  # neither side of a shard is a multiple of these
KRON = KronFold(*(jnp.asarray(RANDOM.normal(size=(2, size, 4)), jnp.float32) for size in (D, F)))


def mesh(*shape):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 4)


def ghost(fold, scale, **options):
    run = jax.jit(lambda a, b, fold, s, v: ghost_sketch(a, b, fold, scale=s, direction=v, **options))
    return run(A, B, fold, scale, DIRECTION)


@pytest.mark.parametrize("axes", [(None, None), (None, "tensor"), ("tensor", None)])
@pytest.mark.parametrize(
    ("fold", "scale"), [(COUNT, SCALE), (KRON, SCALE), (KRON, None)], ids=["count", "kron", "plain"]
)
def test_eight_devices_give_the_numbers_of_one(fold, scale, axes):
    alone = ghost(fold, scale)
    with jax.set_mesh(mesh(1, 2, 2, 2)):
        together = ghost(fold, scale, axes=axes)
    for one, many in zip(alone, together, strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("fold", "axes"), [(COUNT, ("tensor", None)), (KRON, (None, "tensor"))], ids=["count", "kron"])
def test_the_kernel_on_many_devices_gives_the_numbers_of_one(fold, axes):
    alone = ghost(fold, SCALE)
    with jax.set_mesh(mesh(1, 2, 1, 2)):
        together = ghost(fold, SCALE, axes=axes, implementation="interpret")
    for one, many in zip(alone, together, strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("form", "implementation"), [("stride", "xla"), ("hash", None), ("stride", "interpret")])
def test_count_sketch_on_many_devices(form, implementation):
    x = jnp.einsum("ntd,ntf->ndf", A, B)
    alone = count_sketch(x, jnp.uint32(3), 90, form=form)
    for axes in ((None, "tensor"), ("tensor", None))[: 1 if implementation == "interpret" else 2]:
        with jax.set_mesh(mesh(1, 2, 1, 2)):
            run = jax.jit(
                lambda x, axes=axes: count_sketch(
                    x, jnp.uint32(3), 90, form=form, axes=axes, implementation=implementation
                )
            )
            np.testing.assert_allclose(run(x), alone, atol=1e-4)


def test_within_a_callers_shard_map_parts_are_summed_as_well():
    alone, _ = ghost(COUNT, SCALE)

    def body(a, b, scale):
        return ghost_sketch(a, b, COUNT, scale=scale, axes=(None, "tensor"))[0]

    batch, split = PartitionSpec(("replica", "data", "fsdp")), PartitionSpec(None, "tensor")
    with jax.set_mesh(mesh(1, 2, 1, 2)):
        specs = (batch, PartitionSpec(*batch, None, "tensor"), split)
        run = jax.shard_map(body, in_specs=specs, out_specs=batch, check_vma=False)
        np.testing.assert_allclose(jax.jit(run)(A, B, SCALE), alone, atol=1e-4)
        x = jnp.einsum("ntd,ntf->ndf", A, B)
        counted = jax.shard_map(
            lambda x: count_sketch(x, jnp.uint32(3), 96, axes=(None, "tensor")),
            in_specs=(PartitionSpec(*batch, None, "tensor"),),
            out_specs=batch,
            check_vma=False,
        )
        together = jax.jit(counted)(x)
    np.testing.assert_allclose(together, count_sketch(x, jnp.uint32(3), 96), atol=1e-4)


def test_sizes_that_do_not_divide_are_told():
    with jax.set_mesh(mesh(1, 4, 1, 2)):
        with pytest.raises(UserError, match="6 examples do not divide over 4 batch shards"):
            ghost_sketch(A[:6], B[:6], COUNT)
        with pytest.raises(UserError, match="25 does not divide over the 2 devices of axis 'tensor'"):
            count_sketch(jnp.zeros((4, 25, 2)), jnp.uint32(0), 4, axes=("tensor", None))
        with pytest.raises(UserError, match=r"'data' must be None or one of \['tensor'\]"):
            ghost_sketch(A, B, COUNT, axes=("data", None))
        with pytest.raises(UserError, match=r"'model' must be None or one of \['tensor'\]"):
            count_sketch(A, jnp.uint32(0), 4, axes=(None, "model"))
