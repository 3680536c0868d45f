"""How well sketches keep utilities and inner products of real text's gradients, on a model that has begun to learn.

`spearman.<sketch>`: rank agreement of <sketch P g_i, sketch g_proxy> with <P g_i, g_proxy>. `gram_error.<sketch>`:
relative Frobenius error of the matrix <P g_i, P g_j>. P is AdamW's exact diagonal in what is compared with, always; a
sketch under its rank-1 form ('factored') is charged for that too. '_root': R with R R = P stands on both sides, so
utilities are <sketch R g_i, sketch R g_proxy>, and the matrix is <R g_i, R g_j> = <P g_i, g_j>. Gradients are those of
the blocks; `<...>.all` adds embedding, last norm and head, where P is largest on tokens that were hardly ever seen.
Repetitions are seeds of the sketch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from scipy.stats import spearmanr

from benchmarks.efficiency.mixes import REPORT, pool
from benchmarks.harness import Figures
from opus_jax.config import Config, from_mapping
from opus_jax.data.buffers import every_step
from opus_jax.data.candidates import CandidateStream
from opus_jax.influence.ghost.scores import Sketching, scores
from opus_jax.influence.per_example import per_example_gradients
from opus_jax.influence.sketch import CountSketch, KronSketch, Sketch, TensorSketch, sketch_tree
from opus_jax.models.loss import row_losses
from opus_jax.optim.matrix_preconditioner import Diagonal, Factored, is_stacked, matrix_preconditioners, roots
from opus_jax.training.build import Parts, build
from opus_jax.training.feed import put_rows
from opus_jax.training.state import TrainState, init_state

CANDIDATES = 32

SKETCHES: dict[str, tuple[Sketch, str]] = {  # family and width, and the form of P inside
    "count": (CountSketch(8192), "exact"),
    "count_32768": (CountSketch(32768), "exact"),
    "kron": (KronSketch(), "exact"),
    "kron_8192": (KronSketch(8, 32), "exact"),
    "kron_2x64": (KronSketch(2, 64), "exact"),
    "kron_8x64": (KronSketch(8, 64), "exact"),
    "kron_factored": (KronSketch(), "factored"),
    "kron_8192_factored": (KronSketch(8, 32), "factored"),
    "tensor": (TensorSketch(8192), "factored"),
    "count_root": (CountSketch(8192), "root"),
    "kron_8192_root": (KronSketch(8, 32), "root"),
}
FORMS = ("exact", "factored", "root")


def config_of(quick: bool) -> Config:
    """A model of the smallest width at which every matrix is several times larger than its sketch."""
    mapping = pool(REPORT, "in_pool")
    mapping["corpus"] |= {"max_bytes": 400_000 if quick else 4_000_000, "row_tokens": 128}
    mapping["corpus"] |= {"proxy_share": 0.1, "validation_share": 0.1}
    mapping["proxy"] |= {"rows": 16}
    model = {"preset": "quickstart", "dtype": "float32"} | ({} if quick else {"width": 256, "heads": 4})
    return from_mapping(
        mapping
        | {
            "tokenizer": {"vocab_size": 2048},
            "model": model,
            "optimizer": {"schedule": "constant", "learning_rate": 0.01 if quick else 0.006},
            "batch": {"rows": 16},
            "selection": {"method": "random"},
        }
    )


def measure_fidelity(config: Config, steps: int, seeds: int) -> Figures:
    """Of every sketch, for each seed, after so many steps of training on random rows."""
    parts = build(config)
    point = trained(parts, steps)
    figures: Figures = {}
    for name, found in agreements(point, seeds):
        for key, value in found.items():
            measure, *subset = key.split(".")
            figures.setdefault(".".join([measure, name, *subset]), []).append(value)
    return figures


@dataclass(frozen=True)
class Point:
    """A model in training, P (or R) of every leaf in each form, candidates, and the proxy's gradient."""

    losses: Callable[[Any, Any], Array]
    params: Any
    preconditioners: dict[str, Any]
    candidates: Any
    proxy_gradient: Any


def trained(parts: Parts, steps: int) -> Point:
    state = init_state(parts.spec, parts.optimizer, parts.config.run.seed, parts.mesh, directed=False)
    batches = _rows(parts, "train", parts.config.candidates)
    for _ in range(steps):
        state, _ = parts.step(state, next(batches), None)
    return _point(
        parts, state, next(_rows(parts, "train", CANDIDATES)), next(_rows(parts, "proxy", parts.config.proxy.rows))
    )


def agreements(point: Point, seeds: int) -> Iterator[tuple[str, dict[str, float]]]:
    """(name, its figures), a seed each; 'factored' is the rank-1 P without any sketch."""
    gradients = jax.jit(partial(per_example_gradients, point.losses))(point.params, point.candidates)
    whole = {form: [_flat(x) for x in _moved(point, form, gradients)] for form in FORMS}
    yield "factored", _on_both(whole["factored"], whole["exact"], point.params, None)
    for name, (sketch, form) in SKETCHES.items():
        run, reference = jax.jit(partial(_sketched, point, sketch, form)), whole["root" if form == "root" else "exact"]
        for seed in range(seeds):
            sketches = [np.asarray(x, np.float64) for x in run(jnp.uint32(seed))]
            flat = [x.reshape(x.shape[0], -1) for x in sketches]
            yield name, _on_both(flat, reference, point.params, sketch.width)


def _on_both(
    pair: list[np.ndarray], exact: list[np.ndarray], params: PyTree[Array], width: int | None
) -> dict[str, float]:
    """Figures on the blocks and on all; (candidates, proxy) each, the first sketched to so many numbers a matrix."""
    leaves = [(x, is_stacked(path)) for path, x in jax.tree_util.tree_leaves_with_path(params)]
    entries = np.concatenate([np.full(x.size, stacked) for x, stacked in leaves])
    slots = np.concatenate([np.full(x.shape[0] if stacked else 1, stacked) for x, stacked in leaves])
    columns = entries if width is None else np.repeat(slots, width)
    blocks = _compared([x[:, columns] for x in pair], [x[:, entries] for x in exact])
    return blocks | {f"{key}.all": value for key, value in _compared(pair, exact).items()}


def _compared(pair: list[np.ndarray], exact: list[np.ndarray]) -> dict[str, float]:
    gram, exact_gram = (of_candidates @ of_candidates.T for of_candidates, _ in (pair, exact))
    utilities, exact_utilities = ((of_candidates @ proxy.T)[:, 0] for of_candidates, proxy in (pair, exact))
    return {
        "spearman": float(spearmanr(utilities, exact_utilities).statistic),
        "gram_error": float(np.linalg.norm(gram - exact_gram) / np.linalg.norm(exact_gram)),
    }


def _sketched(point: Point, sketch: Sketch, form: str, seed: Array) -> tuple[Array, Array]:
    """(of all candidates [N, S, M], out of the engine; of the proxy [1, S, M])."""
    sketching = Sketching(sketch, seed, point.preconditioners[form])
    of_candidates = scores(point.losses, point.params, point.candidates, sketching=sketching).sketches
    return of_candidates, sketch_tree(sketch, _moved_proxy(point, form), seed)


def _moved(point: Point, form: str, gradients: PyTree[Array]) -> tuple[PyTree[Array], PyTree[Array]]:
    """(P g_i, g_proxy), or with roots (R g_i, R g_proxy)."""
    return _applied(point.preconditioners[form], gradients), _moved_proxy(point, form)


def _moved_proxy(point: Point, form: str) -> PyTree[Array]:
    proxy = jax.tree.map(lambda g: g[None], point.proxy_gradient)
    return _applied(point.preconditioners[form], proxy) if form == "root" else proxy


def _point(parts: Parts, state: TrainState, candidates: Any, proxy: Any) -> Point:
    losses = partial(row_losses, parts.spec)
    forms = {
        form: matrix_preconditioners(parts.optimizer, state.opt_state, state.params, form)
        for form in ("exact", "factored")
    }
    forms["root"] = roots(forms["exact"])
    gradient = jax.jit(jax.grad(lambda params: losses(params, proxy).mean()))(state.params)
    return Point(losses, state.params, forms, candidates, gradient)


def _applied(preconditioners: PyTree[Any], gradients: PyTree[Array]) -> PyTree[Array]:
    is_one = lambda x: isinstance(x, Diagonal | Factored)  # noqa: E731
    return jax.tree.map(lambda p, g: p.apply(g), preconditioners, gradients, is_leaf=is_one)


def _flat(tree: PyTree[Array]) -> np.ndarray:
    """float64[N, P]."""
    return np.concatenate([np.asarray(x, np.float64).reshape(x.shape[0], -1) for x in jax.tree.leaves(tree)], axis=1)


def _rows(parts: Parts, split: str, rows: int) -> Iterator[Any]:
    plan = parts.candidate_plan() if split == "train" else parts.proxy_plan()
    stream = CandidateStream(parts.reader(split), plan, parts.config.run.seed, every_step(rows))
    return (put_rows(host, parts.mesh) for host in stream)
