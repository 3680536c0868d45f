"""What per-example sketches cost in time and memory, beside the passes they add to and the ways they replace.

All methods run in turn in one process, on the same rows, each in chunks of the size that was fastest for it in a
short trial of the same process. The large batch is worked through a part at a time: one round is one part.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from benchmarks.harness import Figures
from benchmarks.sketching.official import draw_tables, official_sketches
from benchmarks.sketching.stack import Blocks, Stack, split, stack_of
from opus_jax.influence.chunks import map_chunks
from opus_jax.influence.ghost.scores import Sketching, scores
from opus_jax.influence.per_example import per_example_gradients
from opus_jax.influence.sketch import CountSketch, KronSketch, Sketch, sketch_tree
from opus_jax.models.flops import forward_flops
from opus_jax.models.presets import PRESETS
from opus_jax.optim.matrix_preconditioner import Factored

WIDTH = 8192
OURS, FINER, FLOOR = "kron_2x64", "kron_8x32", "activation_backward"  # ours in two forms of as many numbers
RATIOS = {  # figure: (method, over what)
    "time_over_activation_backward": (OURS, FLOOR),
    "time_over_activation_backward.kron_8x32": (FINER, FLOOR),
    "speedup.vmap_stride": ("vmap_stride", OURS),
    "speedup.vmap_hash": ("vmap_hash", OURS),
    "speedup.official_scheme": ("official_scheme", OURS),
}

Run = Callable[[Float[Array, "N T D"]], Array]


@dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
      layers, rows, tokens: of the stack and the batch.
      parts: of equal numbers of rows, in which the batch is timed.
      chunks: rows at a time that are tried.
      rounds: each on one part, the parts in turn.
      trial_layers: of the trial that picks the chunks.
    """

    layers: int
    rows: int
    tokens: int
    parts: int
    chunks: tuple[int, ...]
    rounds: int
    trial_layers: int
    preset: str = "gpt2-small"

    @property
    def rows_at_once(self) -> int:
        return self.rows // self.parts


FULL = Size(layers=12, rows=32, tokens=512, parts=4, chunks=(1, 2, 4, 8), rounds=4, trial_layers=1)
QUICK = Size(layers=2, rows=8, tokens=128, parts=1, chunks=(2, 8), rounds=3, trial_layers=1)


@dataclass(frozen=True)
class Subject:
    """A stack with its parameters, and all methods on it, each a function of the activations that go in."""

    stack: Stack
    matrices: Blocks
    fixed: Blocks
    tables: Any

    def activation_backward(self, x: Float[Array, "N T D"]) -> Array:
        """The floor: gradient with respect to what goes in."""
        return jax.grad(lambda x: self.losses(self.matrices, x).sum())(x)

    def ghost(self, sketch: Sketch, x: Float[Array, "N T D"]) -> Array:
        sketching = Sketching(sketch, jnp.uint32(0), jax.tree.map(_factored, self.matrices))
        return scores(self.losses, self.matrices, x, sketching=sketching).sketches

    def vmapped(self, form: str, x: Float[Array, "N T D"]) -> Array:
        gradients = per_example_gradients(self.losses, self.matrices, x)
        return sketch_tree(CountSketch(WIDTH, form), gradients, jnp.uint32(0))

    def official(self, x: Float[Array, "N T D"]) -> Array:
        return official_sketches(self.stack, self.matrices, self.fixed, self.tables, WIDTH, x)

    def losses(self, matrices: Blocks, x: Float[Array, "N T D"]) -> Float[Array, " N"]:
        return self.stack.losses(matrices, self.fixed, x)


jax.tree_util.register_dataclass(Subject, data_fields=["matrices", "fixed", "tables"], meta_fields=["stack"])

METHODS: dict[str, Callable[[Subject, Any], Array]] = {
    FLOOR: Subject.activation_backward,
    OURS: lambda subject, x: subject.ghost(KronSketch(2, 64), x),
    FINER: lambda subject, x: subject.ghost(KronSketch(8, 32), x),
    "vmap_stride": lambda subject, x: subject.vmapped("stride", x),
    "vmap_hash": lambda subject, x: subject.vmapped("hash", x),
    "official_scheme": Subject.official,
}


def measure_speed(size: Size) -> tuple[dict[str, Any], Figures]:
    """Settings found, and ratios of each round."""
    chunks = _tuned(size)
    subject, batch = _subject(size, size.layers), _inputs(size, size.rows)
    runs = {name: _chunked(name, chunks[name], subject, batch[: size.rows_at_once]) for name in METHODS}
    parts = [batch[i :: size.parts] for i in range(size.parts)]
    seconds = []
    for number in range(size.rounds):
        names = list(runs) if number % 2 == 0 else list(runs)[::-1]
        seconds.append({name: _seconds(runs[name], parts[number % size.parts]) for name in names})
        print(f"speed: round {number}: {_shown(seconds[-1])}", file=sys.stderr, flush=True)
    figures: Figures = {key: [t[a] / t[b] for t in seconds] for key, (a, b) in RATIOS.items()}
    figures["speedup.vmap"] = [min(t["vmap_stride"], t["vmap_hash"]) / t[OURS] for t in seconds]
    figures |= {f"seconds_per_row.{name}": [t[name] / size.rows_at_once for t in seconds] for name in runs}
    return {"rows_at_once": chunks}, figures


def flop_ratios(size: Size) -> Figures:
    """FLOPs as compiled, over those of the forward pass as counted by hand; both of one block, as loops are counted."""
    subject, rows = _abstract(size, "none")
    forward = size.rows * forward_flops(replace(subject.stack.spec, layers=1, vocab_size=0), size.tokens)
    flops = lambda name: _compile(METHODS[name], subject, rows).cost_analysis()["flops"]  # noqa: E731
    return {f"flops_over_forward.{name}": [flops(name) / forward] for name in (FLOOR, OURS, FINER)}


def memory_ratios(size: Size) -> Figures:
    """Temporaries and outputs of the whole batch at once, as compiled, over those of `vmap(grad)` and CountSketch."""
    whole = {remat: _abstract(size, remat) for remat in ("none", "full")}
    vmapped = _bytes(METHODS["vmap_stride"], *whole["none"])
    names = {"vmap": "full", "vmap_without_remat": "none"}
    return {f"memory_ratio.{name}": [_bytes(METHODS[OURS], *whole[remat]) / vmapped] for name, remat in names.items()}


# --------------------------------------------------------------------------------------------------- timing


def _tuned(size: Size) -> dict[str, int]:
    """The chunk with which each method is fastest, on one part of the rows and fewer layers."""
    subject, rows = _subject(size, size.trial_layers), _inputs(size, size.rows_at_once)
    chosen = {}
    for name in METHODS:
        seconds = {chunk: _seconds(_chunked(name, chunk, subject, rows), rows) for chunk in size.chunks}
        chosen[name] = min(seconds, key=lambda chunk: seconds[chunk])
        print(f"speed: {name}: seconds by rows at once: {_shown(seconds)}", file=sys.stderr, flush=True)
    return chosen


def _chunked(name: str, chunk: int, subject: Subject, rows: Float[Array, "N T D"]) -> Run:
    """Run once already, for the first run has to ask for its memory."""
    chunked = lambda subject, rows: map_chunks(partial(METHODS[name], subject), rows, chunk)  # noqa: E731
    run = partial(_compile(chunked, subject, rows), subject)
    jax.block_until_ready(run(rows))
    return run


def _seconds(run: Run, rows: Float[Array, "N T D"]) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(run(rows))
    return time.perf_counter() - begun


def _shown(seconds: dict[Any, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())


# ------------------------------------------------------------------------------------------------- subjects


def _subject(size: Size, layers: int, remat: str = "none") -> Subject:
    stack = stack_of(size.preset, layers=layers, remat=remat)
    matrices, fixed = split(jax.jit(stack.init)(jax.random.key(0)))
    tables = jax.jit(partial(draw_tables, m=WIDTH))(jax.random.key(1), matrices)
    return Subject(stack, matrices, fixed, tables)


def _inputs(size: Size, rows: int) -> Float[Array, "N T D"]:
    return jax.random.normal(jax.random.key(2), (rows, size.tokens, PRESETS[size.preset].width))


def _abstract(size: Size, remat: str) -> tuple[Subject, Any]:
    """Shapes alone: the whole batch at once need not fit this machine."""
    return jax.eval_shape(lambda: (_subject(size, size.layers, remat), _inputs(size, size.rows)))


def _compile(method: Callable[[Subject, Any], Array], subject: Subject, rows: Any) -> Any:
    return jax.jit(method).lower(subject, rows).compile()


def _bytes(method: Callable[[Subject, Any], Array], subject: Subject, rows: Any) -> int:
    stats = _compile(method, subject, rows).memory_analysis()
    return stats.temp_size_in_bytes + stats.output_size_in_bytes


def _factored(leaf: Float[Array, "L D F"]) -> Factored:
    """Any preconditioner that acts on the factors: its numbers do not matter to what is measured."""
    return Factored(jnp.ones(leaf.shape[:-1]), jnp.ones((leaf.shape[0], leaf.shape[-1])))
