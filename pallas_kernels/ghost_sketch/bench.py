"""Block sizes of the ghost sketch, as the TPU compiler sees them: `python -m pallas_kernels.ghost_sketch.bench`.

No TPU is needed. For each generation, layer and size of tile, one program (a block of examples) is compiled for an
absent chip, and the instruction bundles of its schedule are counted: one bundle is issued per cycle, so this is the
time of the program without stalls. Beside it stands the time that its matrix products need at the peak rate, and the
time that its blocks need from HBM; the largest of the three bounds the program, and `generations` takes what makes that
least. "does not fit" is the compiler's word on VMEM.
"""

import argparse
import dataclasses
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from opus_jax.distributed.topology import absent_devices, compiler_environment, parse_topology
from pallas_kernels.generations import LIMITS
from pallas_kernels.ghost_sketch.blocks import Blocks, Work, choose_blocks, cost, vmem_bytes
from pallas_kernels.ghost_sketch.cases import LAYERS, Case

CHIPS = ("v5e:1x1", "v5p:2x2x1", "v6e:1x1")
SIZES = ((256, 2048), (512, 2048), (1024, 1024), (1024, 2048), (1024, 4096))  # largest tile, and tokens of a program

# Of one TensorCore: published bfloat16 FLOP/s and HBM bytes/s, and the clock at which its matrix units give them.
PEAKS = {"v5e": (197e12, 819e9, 1.5e9), "v5p": (229.5e12, 1382e9, 1.75e9), "v6e": (918e12, 1640e9, 1.75e9)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("chips", nargs="*", default=list(CHIPS), help="for example v5e:1x1")
    parser.add_argument("--layers", nargs="*", default=[case.name for case in LAYERS])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = [case for case in LAYERS if case.name in options.layers]
    if options.child:
        _print_chip(options.chips[0], cases)
        return
    print("chip layer                   n    t    d    f  VMEM MiB  bundles us  MXU us  HBM us   flops   bytes")
    for chip in options.chips:
        with tempfile.TemporaryDirectory() as folder:
            dump = {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true", "DUMP": folder}
            command = [sys.executable, "-m", "pallas_kernels.ghost_sketch.bench", chip, "--child", "--layers"]
            environment = os.environ | compiler_environment(parse_topology(chip)) | dump
            subprocess.run([*command, *options.layers], env=environment, check=True)


def _print_chip(chip: str, cases: list[Case]) -> None:
    generation = chip.split(":")[0]
    device = absent_devices(parse_topology(chip))[0]
    for case in cases:
        work = Work(case.n, case.t, case.d, case.f, 2, (8, 1024), multiplied=False, scaled=True, aligned=True)
        for tile, tokens in SIZES:
            limits = dataclasses.replace(LIMITS[generation], tile=tile, tokens=tokens)
            blocks = choose_blocks(work, limits=limits)
            print(_line(generation, case, work, blocks, _bundles(device, case, blocks)), flush=True)


def _line(generation: str, case: Case, work: Work, blocks: Blocks, bundles: int | None) -> str:
    """Times of one program with all its examples: what was compiled has one example, so its bundles are multiplied."""
    flops, bandwidth, clock = PEAKS[generation]
    whole = cost(work, blocks)
    times = [
        None if bundles is None else blocks.n * bundles / clock,
        2 * blocks.n * blocks.t * blocks.d * blocks.f / flops,
        whole.bytes_accessed / math.prod(blocks.grid(work)) / bandwidth,
    ]
    shown = " ".join("does not fit" if x is None else f"{1e6 * x:8.1f}" for x in times)
    sizes = f"{blocks.n:3d} {blocks.t:4d} {blocks.d:4d} {blocks.f:4d}"
    vmem = vmem_bytes(work, blocks) / 2**20
    return f"{generation:4s} {case.name:22s} {sizes} {vmem:8.1f} {shown}  {whole.flops:.3g} {whole.bytes_accessed:.3g}"


def _bundles(device: Any, case: Case, blocks: Blocks) -> int | None:
    """Bundles of a program of one example and one tile; None where it does not fit into VMEM."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from pallas_kernels.ghost_sketch import tpu
    from pallas_kernels.ghost_sketch.fold import CountFold

    mesh = Mesh([device], ("data",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    one = dataclasses.replace(blocks, n=1)
    tokens = [jax.ShapeDtypeStruct((1, one.t, s), jnp.bfloat16, sharding=whole) for s in (one.d, one.f)]
    matrix = jax.ShapeDtypeStruct((one.d, one.f), jnp.float32, sharding=whole)
    seed = jax.ShapeDtypeStruct((), jnp.uint32, sharding=whole)

    def call(a: Any, b: Any, seed: Any, scale: Any, direction: Any) -> Any:
        return tpu.ghost_sketch(a, b, CountFold(seed, 8, 1024), scale, direction, blocks=one)

    for old in Path(os.environ["DUMP"]).iterdir():
        old.unlink()
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.shard_map(call, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False))
        try:
            lowered.lower(*tokens, seed, matrix, matrix).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return None
    return _scheduled(Path(os.environ["DUMP"]))


def _scheduled(folder: Path) -> int:
    (analysis,) = folder.glob("*ghost_sketch*schedule-analysis_final_bundles.txt")
    found = re.search(r"total scheduled bundles:\s+(\d+)", analysis.read_text())
    if found is None:
        raise RuntimeError(f"{analysis.name} does not state its bundles")
    return int(found.group(1))


if __name__ == "__main__":
    main()
