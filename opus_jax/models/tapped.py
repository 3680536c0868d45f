"""Matrices that report what each row of a batch does to them, out of one backward pass.

A `Tapped` stands in the parameter tree where a matrix stood, so it travels wherever parameters do: through `scan`,
remat and any sharding. The product with it is an ordinary product, but its backward pass hands the inputs a_t and the
cotangents b_t of each row to a rule (a sketch of sum_t a_t b_t^T, an inner product with it, or both factors
themselves), and the rule's answer becomes the cotangent of `tap`, an array of zeros. `jax.grad` with respect to the
taps alone then returns the answers of all rows and layers, and no weight gradient is computed that nobody asked for.
A plain array in the same place is a plain product, through which forward mode passes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from opus_jax.errors import UserError
from opus_jax.models.thin import Thin


@runtime_checkable
class Rule(Protocol):
    """What a tap reports; hashable, for it is part of the compiled program. G_i = sum_t a_t b_t^T is row i's gradient.

    `constants` are the arrays it needs (preconditioner, seeds, a direction). Answers have the rows first.
    """

    def of_product(
        self, inputs: Float[Array, "N T D"], cotangents: Float[Array, "N T F"], constants: Any
    ) -> PyTree[Array]:
        """Of y = x W, with a_t the inputs."""
        ...

    def of_lookup(self, ids: Int[Array, "N T"], cotangents: Float[Array, "N T F"], constants: Any) -> PyTree[Array]:
        """Of y = W[ids], with a_t the unit vectors of the ids."""
        ...


@partial(jax.tree_util.register_dataclass, data_fields=["array", "tap", "constants"], meta_fields=["name", "rule"])
@dataclass(frozen=True, eq=False)
class Tapped:
    """A matrix and its tap; see the top of the file.

    Attributes:
      array: [D, F], or [L, D, F] before `scan` takes it apart; the same leading axis on all leaves of the next two.
      tap: zeros with the shapes of the rule's answer.
      constants: what the rule needs; not differentiated.
      name: of the parameter, for errors.
      rule: what is reported.
    """

    array: Any  # these three are Any: a tree of the same form holds shapes, or what scan makes of them
    tap: Any
    constants: Any
    name: str
    rule: Rule

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise UserError(
            f"the matrix {self.name} is used other than by a tapped product or lookup, so the ghost engine cannot see "
            "what rows do to it; use opus_jax.models.tapped.product there, or selection.engine = directional"
        )

    __jax_array__ = __array__ = __getitem__ = __matmul__ = __rmatmul__ = __mul__ = __rmul__ = __add__ = __radd__ = (
        _refuse
    )

    def __getattr__(self, attribute: str) -> Any:
        if attribute in ("astype", "T", "reshape", "dot", "at", "sum", "mean", "transpose", "swapaxes"):
            self._refuse()
        raise AttributeError(attribute)


def product(x: Float[Array, "*rows D"], kernel: Any, *, dtype: DTypeLike | None = None) -> Float[Array, "*rows F"]:
    """x W, computed in the type of x, summed and returned in `dtype` where given."""
    if isinstance(kernel, Tapped):
        return _product(kernel.rule, False, dtype, x, kernel.array, kernel.tap, kernel.constants)
    if isinstance(kernel, Thin):
        return kernel.steer(_dot(x, kernel.array, False, dtype), x)
    return _dot(x, kernel, False, dtype)


def product_with_transposed(
    x: Float[Array, "*rows F"], table: Any, *, dtype: DTypeLike | None = None
) -> Float[Array, "*rows D"]:
    """x W^T, as `product`: a head that shares the embedding's table. The gradient reported is that of W."""
    if isinstance(table, Tapped):
        return _product(table.rule, True, dtype, x, table.array, table.tap, table.constants)
    return _dot(x, table, True, dtype)


def lookup(
    table: Any, ids: Int[Array, "N T"], prepared: Callable[[Float[Array, "D F"]], Float[Array, "D F"]]
) -> Float[Array, "N T F"]:
    """W[ids], out of the table as `prepared` makes it (its type, its sharding)."""
    if isinstance(table, Tapped):
        return _lookup(table.rule, prepared, ids, table.array, table.tap, table.constants)
    return jnp.take(prepared(table), ids, axis=0)


def beside(vector: Float[Array, "*N D"], x: Float[Array, "*rows D"]) -> Float[Array, "*broadcast D"]:
    """A gain or bias shaped to meet x: one vector for all, or one for each row, [N, D] beside [N, ..., D]."""
    return vector if vector.ndim == 1 else vector.reshape(vector.shape[0], *(1,) * (x.ndim - 2), vector.shape[1])


# ---------------------------------------------------------------------------------------------- derivatives


def _dot(x: Array, kernel: Array, transposed: bool, dtype: DTypeLike | None) -> Array:
    kernel = kernel.astype(x.dtype)
    return jnp.dot(x, kernel.T if transposed else kernel, preferred_element_type=dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(rule: Rule, transposed: bool, dtype: Any, x: Array, kernel: Array, tap: Any, constants: Any) -> Array:
    del rule, tap, constants
    return _dot(x, kernel, transposed, dtype)


def _product_forward(
    rule: Rule, transposed: bool, dtype: Any, x: Array, kernel: Array, tap: Any, constants: Any
) -> tuple[Array, Any]:
    return _product(rule, transposed, dtype, x, kernel, tap, constants), (x, kernel, constants)


def _product_backward(rule: Rule, transposed: bool, dtype: Any, residuals: Any, cotangent: Array) -> Any:
    x, kernel, constants = residuals
    _, pull = jax.vjp(lambda x, kernel: _dot(x, kernel, transposed, dtype), x, kernel)
    to_x, to_kernel = pull(cotangent)
    inputs, outputs = (cotangent, x) if transposed else (x, cotangent)
    return to_x, to_kernel, rule.of_product(_rows(inputs), _rows(outputs), constants), None


_product.defvjp(_product_forward, _product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _lookup(rule: Rule, prepared: Any, ids: Array, table: Array, tap: Any, constants: Any) -> Array:
    del rule, tap, constants
    return jnp.take(prepared(table), ids, axis=0)


def _lookup_forward(rule: Rule, prepared: Any, ids: Array, table: Array, tap: Any, constants: Any) -> tuple[Array, Any]:
    return _lookup(rule, prepared, ids, table, tap, constants), (ids, table, constants)


def _lookup_backward(rule: Rule, prepared: Any, residuals: Any, cotangent: Array) -> Any:
    ids, table, constants = residuals
    _, pull = jax.vjp(lambda table: jnp.take(prepared(table), ids, axis=0), table)
    return None, *pull(cotangent), rule.of_lookup(ids, _rows(cotangent), constants), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def _rows(x: Array) -> Float[Array, "N T D"]:
    """Rows and one axis of tokens, whatever stood between."""
    return x.reshape(x.shape[0], -1, x.shape[-1])
