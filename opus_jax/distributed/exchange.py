"""Chosen rows from where they lie to where they will be trained on: from device to device, and none to all of them.

Asked for `rows[indices]`, the compiler sends every row to every device, so what a chip receives grows with the slice.
Here a chip sends no more rows than it holds and receives no more than it will train on, however many chips there are.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int, Int32

from opus_jax.distributed.axes import RULES, constrain, split_ways

SLICES, WITHIN = "replica", ("data", "fsdp")  # the batch axis between slices, and those within one
_FEW_ROUTES, _FREELY_ROUTED = ("TPU v5 lite", "TPU v5e"), 16  # kinds of devices, and their chips that do

Offsets = Int[Array, " M"]


class Plan(NamedTuple):
    """What one device exchanges with the M devices of its slice: as `jax.lax.ragged_all_to_all` takes it.

    Attributes:
      input_offsets: where the rows for each device begin among those held here.
      send_sizes: how many they are.
      output_offsets: where they begin over there.
      recv_sizes: how many rows each device sends.
    """

    input_offsets: Offsets
    send_sizes: Offsets
    output_offsets: Offsets
    recv_sizes: Offsets


def take_rows(rows: Int32[Array, "N W"], indices: Int[Array, " K"]) -> Int32[Array, "K W"]:
    """`rows[indices]`, both split over the batch axes.

    Args:
      indices: sorted, the same on every device.

    Within a slice whole rows go from device to device. Between slices every device exchanges with its counterparts
    alone: (slices - 1) times the rows it trains on.
    """
    devices = split_ways("batch")
    if devices == 1 or rows.shape[0] % devices or indices.shape[0] % devices:
        return constrain(rows[indices], ("batch", None))
    split = PartitionSpec(RULES["batch"], None)
    mesh = jax.sharding.get_abstract_mesh()
    everywhere, exchanged = set(mesh.axis_names), partial(_exchanged, ragged=has_ragged_exchange(mesh))
    return jax.shard_map(
        exchanged, in_specs=(split, PartitionSpec()), out_specs=split, axis_names=everywhere, check_vma=False
    )(rows, indices)


def has_ragged_exchange(mesh: Any) -> bool:
    """libtpu refuses it on v5e slices of 32 chips and more, whose links do not route freely."""
    device = mesh.abstract_device
    return device is None or device.device_kind not in _FEW_ROUTES or mesh.size <= _FREELY_ROUTED


def _exchanged(rows: Int32[Array, "n W"], indices: Int[Array, " K"], *, ragged: bool) -> Int32[Array, "k W"]:
    """On one device: its rows in, those that it trains on out."""
    slices, members = jax.lax.axis_size(SLICES), jax.lax.axis_size(WITHIN)
    share, held = indices.shape[0] // (slices * members), rows.shape[0]
    own_slice, member = jax.lax.axis_index(SLICES), jax.lax.axis_index(WITHIN)
    edges = (own_slice * members + jnp.arange(members + 1)) * held
    bounds = jnp.searchsorted(indices, edges, method="compare_all")
    chosen = bounds[member] + jnp.arange(min(held, indices.shape[0]))
    place = indices.at[chosen].get(mode="clip") - (own_slice * members + member) * held
    sent = rows.at[place].get(mode="clip")
    parts = []
    for target in range(slices):
        plan = exchange_plan(bounds, member, target * members, share)
        elsewhere = _ragged if ragged else _padded
        parts.append(jax.lax.platform_dependent(sent, plan, jnp.arange(share), cpu=_padded, default=elsewhere))
    if slices == 1:
        return parts[0]
    return jax.lax.psum_scatter(jnp.stack(parts), SLICES)  # of every row all parts but one are 0


def exchange_plan(bounds: Int[Array, " edges"], member: Int[Array, ""], first: int, share: int) -> Plan:
    """The plan of one member of a slice, for the rows that devices `first` to `first` + M will train on.

    Args:
      bounds: [M + 1], of the chosen rows, in order, the first that each member holds, and their number.
      share: chosen rows that each device trains on, the first device the first ones.
    """

    def overlap(low: Array, high: Array, target: Array) -> tuple[Array, Array]:
        """(first, number) of the chosen rows from low to high that a device trains on."""
        start, end = (jnp.clip(edge, low, high) for edge in (target * share, (target + 1) * share))
        return start, end - start

    targets = first + jnp.arange(bounds.shape[0] - 1)
    low, high = bounds[member], bounds[member + 1]
    start, sizes = overlap(low, high, targets)
    there = jnp.where(sizes > 0, start - targets * share, 0)
    return Plan(start - low, sizes, there, overlap(bounds[:-1], bounds[1:], first + member)[1])


def _ragged(sent: Int32[Array, "n W"], plan: Plan, slots: Int[Array, " k"]) -> Int32[Array, "k W"]:
    empty = jnp.zeros((slots.shape[0], sent.shape[1]), sent.dtype)
    offsets = (x.astype(jnp.int32) for x in plan)
    return jax.lax.ragged_all_to_all(sent, empty, *offsets, axis_name=WITHIN)


def _padded(sent: Int32[Array, "n W"], plan: Plan, slots: Int[Array, " k"]) -> Int32[Array, "k W"]:
    """The same without a ragged exchange (CPU, large v5e slices): every part has room for all rows of its receiver."""
    inside = slots[None] - plan.output_offsets[:, None]
    given = (inside >= 0) & (inside < plan.send_sizes[:, None])
    parts = sent.at[plan.input_offsets[:, None] + inside].get(mode="clip")
    received = jax.lax.all_to_all(jnp.where(given[..., None], parts, 0), WITHIN, 0, 0, tiled=True)
    return received.sum(axis=0)
