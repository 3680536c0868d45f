"""Chosen rows find their way: the plan against a plain reading of a ragged exchange, and the exchange on meshes."""

from itertools import pairwise
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opus_jax.config import MeshConfig
from opus_jax.distributed.axes import sharding
from opus_jax.distributed.exchange import exchange_plan, has_ragged_exchange, take_rows
from opus_jax.distributed.mesh import make_mesh

N, K, WIDTH = 32, 16, 3
ROWS = np.arange(N * WIDTH, dtype=np.int32).reshape(N, WIDTH) - 7


def choices() -> list[np.ndarray]:
    """All on the last devices, all on the first ones, and by chance."""
    dice = np.random.default_rng(0)
    drawn = [np.sort(dice.choice(N, K, replace=False)) for _ in range(4)]
    return [np.arange(N - K, N), np.arange(K), *drawn]


def ragged(sent: list[np.ndarray], plans: list, share: int) -> list[np.ndarray]:
    """What `jax.lax.ragged_all_to_all` is documented to do."""
    received = [np.zeros((share, WIDTH), np.int32) for _ in plans]
    for sender, plan in enumerate(plans):
        for receiver, output in enumerate(received):
            start, count, there = (int(plan[i][receiver]) for i in range(3))
            assert int(plans[receiver].recv_sizes[sender]) == count
            output[there : there + count] = sent[sender][start : start + count]
    return received


@pytest.mark.parametrize("indices", choices(), ids=str)
def test_the_plan_moves_the_chosen_rows(indices: np.ndarray) -> None:
    members, share, held = 8, K // 8, N // 8
    bounds = np.searchsorted(indices, np.arange(members + 1) * held)
    plans = [exchange_plan(jnp.asarray(bounds), jnp.asarray(m), 0, share) for m in range(members)]
    sent = [ROWS[indices[low:high]] for low, high in pairwise(bounds)]
    np.testing.assert_array_equal(np.concatenate(ragged(sent, plans, share)), ROWS[indices])


@pytest.mark.parametrize(
    "shape", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"replica": 2, "data": 2, "fsdp": 2}], ids=str
)
def test_rows_arrive_on_every_mesh(shape: dict[str, int]) -> None:
    mesh = make_mesh(MeshConfig(**shape))
    split = sharding(mesh, ("batch", None), ROWS.shape)
    rows = jax.device_put(ROWS, split)
    with jax.set_mesh(mesh):
        taken = jax.jit(take_rows)
        for indices in choices():
            found = taken(rows, indices)
            np.testing.assert_array_equal(found, ROWS[indices])
            assert found.sharding.is_equivalent_to(split, 2)


def test_rows_that_do_not_divide_are_taken_plainly() -> None:
    mesh = make_mesh(MeshConfig(data=8))
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(jax.jit(take_rows)(ROWS, np.array([3, 5, 30])), ROWS[[3, 5, 30]])
    np.testing.assert_array_equal(take_rows(jnp.asarray(ROWS), jnp.array([1, 2])), ROWS[[1, 2]])


@pytest.mark.parametrize(
    ("kind", "chips", "has"),
    [("TPU v5 lite", 16, True), ("TPU v5 lite", 32, False), ("TPU v5", 512, True), (None, 8, True)],
)
def test_large_slices_of_v5e_have_no_ragged_exchange(kind: str | None, chips: int, has: bool) -> None:
    device = kind and SimpleNamespace(device_kind=kind)
    assert has_ragged_exchange(SimpleNamespace(abstract_device=device, size=chips)) is has
