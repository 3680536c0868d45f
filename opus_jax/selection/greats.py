"""GREATS (Wang et al., NeurIPS 2024), a rival: greedy, raw gradients, no preconditioner.

    U_i = eta <g_i, g_proxy> - eta^2 <g_i, sum over chosen g_j>,

the next row being the one of the largest U. It is the paper's rule with P = I and temperature 0, without sketches.
"""

from jaxtyping import Array, Float, Int, Key

from opus_jax.selection import paper
from opus_jax.selection.opus import Diagnostics


def select(
    alignment: Float[Array, " N"],
    gram: Float[Array, "N N"],
    k: int,
    *,
    learning_rate: Float[Array, ""] | float,
    key: Key[Array, ""],
) -> tuple[Int[Array, " K"], Diagnostics]:
    """Choose k candidates greedily; the first of equal ones.

    Args:
      alignment: [N], <g_i, g_proxy>. gram: [N, N], <g_i, g_j>. learning_rate: eta.

    Raises:
      UserError: k is not between 1 and N.
    """
    return paper.select(alignment, gram, k, learning_rate=learning_rate, key=key, temperature=0.0)
