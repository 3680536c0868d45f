"""What scoring asks of a TPU's memory, by the TPU compiler's own figures, beside the backward pass it replaces.

The layers are scanned and the compiler counts a loop's body once, so its bytes and FLOPs are those of one block
forward and one backward, whatever the number of layers; `flops_over_forward` says so. Peaks are of all layers.
`python -m benchmarks.sketching.traffic` is the child process: libtpu must be told before JAX starts which absent chip
to compile for. It reads a request from standard input and writes the figures to standard output, as JSON.
"""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from benchmarks.harness import Figures
from opus_jax.distributed.topology import absent_devices, compiler_environment, parse_topology

TOPOLOGY = "v5p:2x2x1"  # one of its chips is compiled for
MODELS = {"gpt2_xl": "gpt2-xl", "llama3_8b": "llama3-8b"}
LAYERS = {"gpt2-xl": 48, "llama3-8b": 8}  # the ordinary backward pass of all 32 layers does not fit one chip
ORDINARY, KINDS = "backward", ("kron", "kron_exact")  # under a factored P by XLA, under AdamW's by the kernel
SIZES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "f16": 2, "s8": 1, "u8": 1, "pred": 1}  # bytes

# Results that are other results, or are in place.
_NO_BUFFERS = {"parameter", "get-tuple-element", "tuple", "while", "bitcast", "constant", "optimization-barrier"}


def measure_traffic(rows: int, tokens: int, models: dict[str, str] | None = None, **changes: Any) -> Figures:
    """Ratios to the ordinary backward pass, for each model and kind of scores; `changes` are of the model's spec."""
    figures: Figures = {}
    for model, preset in (models or MODELS).items():
        request = {"preset": preset, "rows": rows, "tokens": tokens}
        found = compile_in_child(request | {"changes": {"layers": LAYERS.get(preset)} | changes})
        for kind in KINDS:
            figures[f"hbm_traffic.{model}.{kind}"] = [found[kind]["bytes"] / found[ORDINARY]["bytes"]]
            figures[f"hbm_peak.{model}.{kind}"] = [found[kind]["peak"] / found[ORDINARY]["peak"]]
            figures[f"largest_buffer_ratio.{model}.{kind}"] = [found[kind]["largest"] / found["per_example"]]
        for kind in (ORDINARY, *KINDS):
            figures[f"flops_over_forward.{model}.{kind}"] = [found[kind]["flops"] / found["forward"]]
            figures[f"hbm_peak_gib.{model}.{kind}"] = [found[kind]["peak"] / 2**30]
    return figures


def compile_in_child(request: dict[str, Any]) -> dict[str, Any]:
    """Figures of one model, all kinds.

    Raises:
      RuntimeError: the child failed; the end of its standard error is shown.
    """
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.sketching.traffic"],
        input=json.dumps(request),
        env=os.environ | compiler_environment(parse_topology(TOPOLOGY)),
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        raise RuntimeError(f"compiling {request} for {TOPOLOGY} failed:\n{child.stderr[-3000:]}")
    return dict(json.loads(child.stdout.splitlines()[-1]))


def largest_buffer(program: str) -> int:
    """Bytes of the largest array that a compiled program (HLO text) computes into memory, arguments left out."""
    return max(
        (
            SIZES.get(kind, 8) * math.prod(int(n) for n in shape.split(",") if n)
            for result in _results(program)
            for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", result)
        ),
        default=0,
    )


def _results(program: str) -> Iterator[str]:
    """Types of what instructions outside fusions leave in memory."""
    inside_fusions = set(re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", program))
    name = ""
    for line in program.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if header:
            name = header[1]
        found = re.match(r"\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\(", line)
        if found and name not in inside_fusions and found[2] not in _NO_BUFFERS:
            yield found[1]


# ----------------------------------------------------------------------------------------- the child process


def main() -> None:
    request = json.load(sys.stdin)
    print(json.dumps(_compiled(**request)))


def _compiled(preset: str, rows: int, tokens: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Bytes, FLOPs, peak and largest buffer of each kind, and what they are compared with."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from benchmarks.sketching.stack import split, stack_of
    from opus_jax.config import MeshConfig
    from opus_jax.distributed.mesh import make_mesh
    from opus_jax.models.flops import forward_flops

    mesh = make_mesh(MeshConfig(), absent_devices(parse_topology(TOPOLOGY))[:1])
    whole = NamedSharding(mesh, PartitionSpec())
    stack = stack_of(preset, **({"dtype": "bfloat16"} | changes))
    placed = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)  # noqa: E731
    matrices, fixed = jax.tree.map(placed, split(jax.eval_shape(lambda: stack.init(jax.random.key(0)))))
    x = jax.ShapeDtypeStruct((rows, tokens, stack.spec.width), jnp.bfloat16, sharding=whole)

    found: dict[str, Any] = {}
    with jax.set_mesh(mesh):
        for kind in (ORDINARY, *KINDS):
            method, constants = _method(stack, kind, matrices)
            compiled = jax.jit(method).lower(matrices, fixed, x, jax.tree.map(placed, constants)).compile()
            found[kind] = _figures(compiled)
    block = replace(stack.spec, layers=1, vocab_size=0)
    largest = max(math.prod(leaf.shape) for leaf in jax.tree.leaves(matrices))
    return found | {"forward": rows * forward_flops(block, tokens), "per_example": 4 * rows * largest}


def _method(stack: Any, kind: str, matrices: Any) -> tuple[Callable[..., Any], Any]:
    """(function of matrices, the fixed parameters, inputs and preconditioners; the shapes of these)."""
    import jax
    import jax.numpy as jnp

    from opus_jax.influence.ghost.scores import Sketching, scores
    from opus_jax.influence.sketch import KronSketch
    from opus_jax.optim.matrix_preconditioner import Diagonal, Factored

    if kind == ORDINARY:
        backward = jax.grad(lambda matrices, fixed, x: stack.losses(matrices, fixed, x).sum())
        return lambda matrices, fixed, x, _: backward(matrices, fixed, x), None

    row = lambda leaf, *axes: jax.ShapeDtypeStruct(tuple(leaf.shape[i] for i in axes), jnp.float32)  # noqa: E731
    forms = {
        "kron": lambda leaf: Factored(row(leaf, 0, 1), row(leaf, 0, 2)),
        "kron_exact": lambda leaf: Diagonal(row(leaf, 0, 1, 2)),
    }
    implementation = "pallas" if kind == "kron_exact" else "xla"

    def sketches(matrices: Any, fixed: Any, x: Any, preconditioners: Any) -> Any:
        sketching = Sketching(KronSketch(), jnp.uint32(0), preconditioners, implementation=implementation)
        return scores(lambda p, x: stack.losses(p, fixed, x), matrices, x, sketching=sketching).sketches

    return sketches, jax.tree.map(forms[kind], matrices)


def _figures(compiled: Any) -> dict[str, Any]:
    stats, cost, program = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    peak = stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.output_size_in_bytes
    return {
        "bytes": cost["bytes accessed"],
        "flops": cost["flops"],
        "peak": peak - stats.alias_size_in_bytes,
        "largest": largest_buffer(program),
        "kernels": program.count('custom_call_target="tpu_custom_call"'),
    }


if __name__ == "__main__":
    main()
