"""Second and first moments out of any optax state, whatever wraps it."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree
from optax import contrib

from opus_jax.errors import UserError


def second_moments(opt_state: Any, params: PyTree[Any], beta2: float) -> PyTree[Float[Array, "..."] | None]:
    """Bias-corrected second moments nu / (1 - beta2^count) of Adam, in float32, one per parameter.

    The state is searched for `optax.ScaleByAdamState` by type, so chains, injected hyperparameters, accumulation,
    masks and partitions make no difference, and neither do parameters called 'nu'. `optax.tree_utils.tree_get` fails
    on several of these.

    Args:
      opt_state: any optax state.
      params: the parameters it belongs to.
      beta2: the decay (it is not in the state). At count 0 the moments are 0.

    Returns:
      Tree like the parameters; None where no Adam holds the parameter (Muon's, frozen ones).

    Raises:
      UserError: two Adam states hold the same parameter, or a state's tree is not the parameters'.
    """
    filled: list[Any] = [None] * len(jax.tree.leaves(params))
    for state in find_states(opt_state, optax.ScaleByAdamState):
        correction = 1 - jnp.asarray(beta2, jnp.float32) ** jnp.maximum(state.count, 1)
        for slot, nu in _slots(state.nu, params):
            if filled[slot] is not None:
                raise UserError("two Adam states hold the same parameter: give each parameter to one optimizer")
            filled[slot] = nu.astype(jnp.promote_types(nu.dtype, jnp.float32)) / correction
    return jax.tree.unflatten(jax.tree.structure(params), filled)


def muon_momentum(opt_state: Any, params: PyTree[Any]) -> PyTree[Float[Array, "..."] | None]:
    """Muon's momentum, one per parameter; None where Muon does not hold it."""
    filled: list[Any] = [None] * len(jax.tree.leaves(params))
    for state in find_states(opt_state, contrib.MuonState):
        for slot, mu in _slots(state.mu, params):
            filled[slot] = mu
    return jax.tree.unflatten(jax.tree.structure(params), filled)


def find_states(opt_state: Any, kind: type) -> list[Any]:
    """All nodes of one state class, wherever they lie in an optax state."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


def _slots(moments: PyTree[Any], params: PyTree[Any]) -> list[tuple[int, Array]]:
    """(index among the parameters' leaves, moment) of the moments that are not masked out."""
    structure: Any = jax.tree.structure(params)
    index = jax.tree.unflatten(structure, list(range(structure.num_leaves)))
    found: list[tuple[int, Array]] = []

    def claim(moment: Any, slot: Any) -> None:
        if not isinstance(moment, optax.MaskedNode):  # a masked node can stand for a whole subtree of parameters
            found.append((slot, moment))

    try:
        jax.tree.map(claim, moments, index, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    except ValueError as error:
        raise UserError(
            f"the optimizer state does not belong to these parameters: {str(error).splitlines()[0]}"
        ) from None
    return found
