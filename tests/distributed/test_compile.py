import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from opus_jax.config import Config, ModelConfig, from_mapping
from opus_jax.distributed import compile as compiler
from opus_jax.distributed.compile import compile_for, count_collectives, describe, kernel_calls, measure
from opus_jax.distributed.topology import compiler_environment, parse_topology
from opus_jax.errors import MissingExtraError, UserError
from opus_jax.training import lower_step, step

with_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu exists for Linux x86-64 only"
)

CONFIGS = Path(__file__).parents[2] / "configs"

TINY = {
    "model": {"preset": "tiny", "width": 32, "layers": 1, "heads": 2},
    "tokenizer": {"kind": "byte"},
    "corpus": {"row_tokens": 32},
    "batch": {"rows": 4},
    "proxy": {"rows": 4},
    "evaluation": {"batch_rows": 4},
    "selection": {"audit_every": 0},
}

# Compiles x -> sum of squares over all devices of the slice named by the first argument; the second is the size.
TOY = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from opus_jax.distributed.compile import measure
from opus_jax.distributed.topology import absent_devices, parse_topology
topology, size = parse_topology(sys.argv[1]), int(sys.argv[2])
mesh = Mesh(np.array(absent_devices(topology)), ("data",), axis_types=(AxisType.Auto,))
split, whole = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ("data", None))
x = jax.ShapeDtypeStruct((topology.devices, size, size), jnp.float32, sharding=split)
lowered = jax.jit(lambda x: jnp.tanh(x @ x).sum(0), out_shardings=whole).lower(x)
print(json.dumps(measure(lowered, topology)))
"""


def compile_toy(name, size=128):
    environment = os.environ | compiler_environment(parse_topology(name))
    done = subprocess.run(
        [sys.executable, "-c", TOY, name, str(size)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == ""
    return json.loads(done.stdout)


@with_libtpu
def test_two_compilations_at_once_with_exact_sizes():
    names = ["v5e:2x2", "v5p:2x2x1"]
    with ThreadPoolExecutor(2) as pool:
        both = dict(zip(names, pool.map(compile_toy, names), strict=True))
    for name, figures in both.items():
        assert figures["topology"] == name
        assert figures["devices"] == 4
        assert figures["arguments_bytes"] == 128 * 128 * 4
        assert figures["outputs_bytes"] == 128 * 128 * 4
        assert figures["flops"] >= 2 * 128**3
        assert figures["collectives"] == {"all-reduce": 1}


@with_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:1x1", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_table_of_memory_is_what_the_compiler_allows(name):
    figures = compile_toy(name, size=200_000)
    assert not figures["fits"]
    allowed = float(figures["reason"].split("available HBM (")[1].split("G")[0])
    assert allowed == pytest.approx(parse_topology(name).generation.hbm_gib, abs=0.1)


@with_libtpu
@pytest.mark.slow
def test_the_real_step_compiles_and_is_described(tmp_path, capsys):
    file = tmp_path / "figures.json"
    figures = compile_for(from_mapping(TINY), "v5e:2x2", json_file=file)
    assert json.loads(file.read_text()) == figures
    assert figures["collectives"]["all-reduce"] > 0
    assert 0 < figures["peak_bytes"] < figures["hbm_bytes"]
    assert figures["kernels"] == {}, "nothing is sketched"
    assert "HBM per chip" in capsys.readouterr().out


SKETCHED = {"sketch": "count", "sketch_width": 64, "sketched_utilities": True, "direction": "adamw_frozen"}


@with_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("engine", "kernel"), [("ghost", "ghost_sketch"), ("per_example", "count_sketch")])
def test_sketches_of_the_real_step_are_our_kernels(engine, kernel):
    """With AdamW's exact diagonal; those of the ghost engine lie within the scanned backward pass."""
    selection = TINY["selection"] | SKETCHED | {"engine": engine, "redundancy": 0.5}
    figures = compile_for(from_mapping(TINY | {"selection": selection}), "v5e:2x2")
    found = figures["kernels"][kernel]
    assert found["calls"] >= 7, "as many matrices as a block has"
    assert 0 < found["flops"] < figures["flops"]
    assert 0 < found["bytes"] < figures["moved_bytes"]


@with_libtpu
@pytest.mark.slow
def test_the_direct_configuration_has_our_kernels_on_a_pod_slice(capsys):
    figures = compile_for(Config.load(CONFIGS / "opus_direct.yaml"), "v5p:2x2x4")
    assert set(figures["kernels"]) == {"count_sketch"}
    assert figures["kernels"]["count_sketch"]["calls"] > 0
    assert "count_sketch: " in capsys.readouterr().out


@with_libtpu
def test_a_batch_that_does_not_divide_is_the_users_mistake():
    with pytest.raises(UserError, match=r"v5e:2x4.*batch\.rows = 4.*multiple of the 8 data shards"):
        compile_for(from_mapping(TINY), "v5e:2x4")


def test_the_step_is_the_one_that_trains():
    assert lower_step.make_step is step.make_step


def test_lowering_needs_only_shapes():
    import jax

    lowered = lower_step.lower_step(from_mapping(TINY), jax.devices()[:2])
    state, candidates, proxy = lowered.args_info[0]
    assert candidates["tokens"].shape == (8, 32)
    assert proxy["tokens"].shape == (4, 32)
    assert state.reference_gradient is not None


def test_the_model_is_the_one_a_tpu_would_train():
    assert lower_step.model_spec(from_mapping(TINY)).dtype == "bfloat16"
    given = from_mapping(TINY | {"model": {"preset": "tiny", "dtype": "float32"}})
    assert lower_step.model_spec(given).dtype == "float32"
    assert lower_step.model_spec(from_mapping(TINY)).vocab_size == 260
    assert lower_step.model_spec(Config(model=ModelConfig(preset="tiny"))).vocab_size == 2048


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"opus-jax\[tpu\]"):
        compile_for(Config(), "v5e:2x2")


def test_a_bad_topology_is_told_before_libtpu_is_looked_for(monkeypatch):
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="unknown generation"):
        compile_for(Config(), "v9:2x2")


def test_a_failing_child_shows_its_last_words(monkeypatch):
    monkeypatch.setattr(compiler, "_CHILD", "opus_jax.no_such_module")
    with pytest.raises(RuntimeError, match="no_such_module"):
        compiler.compile_in_child({}, parse_topology("v5e:2x2"))


def test_collectives_are_counted_by_kind_and_a_start_once():
    program = """
      %a = f32[8]{0} all-reduce(%x), replica_groups={}
      %b = (f32[8], f32[8]) all-gather-start(%x), dimensions={0}
      %c = f32[8] all-gather-done(%b)
      %d = f32[8] all-reduce(%all-reduce.1), to_apply=%sum
      %e = f32[8] fusion(%all-to-all.2), calls=%f
    """
    assert count_collectives(program) == {"all-reduce": 2, "all-gather": 1}


def test_kernels_are_counted_by_name_with_the_costs_they_state():
    cost = '"cost_estimate":{"flops":"%d","transcendentals":"0","bytes_accessed":"%d"}'
    target = 'custom-call(%%x), custom_call_target="tpu_custom_call"'
    call = target + ', backend_config={"custom_call_config":{"body":"TUz",%s}}'
    program = "\n".join(
        [
            "  %count_sketch.54 = f32[1,8]{1,0} " + call % (cost % (100, 40)),
            "  %count_sketch = (f32[1,8]{1,0}, f32[2]{0}) " + call % (cost % (10, 4)),
            "  ROOT %mine-2 = f32[1,8]{1,0} " + call % '"needs_layout_passes":true',
            '  %sort.1 = f32[8]{0} custom-call(%x), custom_call_target="TopK"',
        ]
    )
    assert kernel_calls(program) == {
        "count_sketch": {"calls": 2, "flops": 110, "bytes": 44},
        "mine-2": {"calls": 1, "flops": 0, "bytes": 0},
    }


def test_kernels_are_printed_with_their_shares():
    kernel = {"calls": 3, "flops": 5 * 10**8, "bytes": 2**28}
    text = describe(FIGURES | {"kernels": {"count_sketch": kernel}})
    assert "count_sketch: 3 calls, 0.25 GiB moved (25.0%), 50.0% of the FLOPs" in text


FIGURES = {
    "topology": "tpu7x:2x2x1", "chips": 4, "devices": 8, "devices_per_chip": 2, "hbm_bytes": 90 * 2**30,
    "fits": True, "compile_seconds": 1.0, "arguments_bytes": 2**30, "outputs_bytes": 2**30, "aliased_bytes": 2**30,
    "temporaries_bytes": 2**30, "program_bytes": 0, "peak_bytes": 2 * 2**30, "flops": 10**9,
    "moved_bytes": 2**30, "collectives": {}, "kernels": {},
}  # fmt: skip


def test_a_chip_of_two_devices_holds_twice_as_much():
    text = describe(FIGURES)
    assert "kernels     none" in text
    assert "HBM per chip: 4.00 GiB of 180.00 GiB at the peak (2.2%)" in text
    assert "collectives none" in text


def test_donated_arguments_are_not_counted_twice():
    stats = SimpleNamespace(
        argument_size_in_bytes=100, output_size_in_bytes=90, alias_size_in_bytes=80, temp_size_in_bytes=7,
        generated_code_size_in_bytes=3,
    )  # fmt: skip
    compiled = SimpleNamespace(
        memory_analysis=lambda: stats,
        cost_analysis=lambda: {"flops": 5.0, "bytes accessed": 7.0},
        as_text=lambda: "%a = f32[] all-reduce(%x)",
    )
    figures = measure(SimpleNamespace(compile=lambda: compiled), parse_topology("v5e:2x2"))
    assert figures["peak_bytes"] == 100 + 90 - 80 + 7 + 3
    assert figures["collectives"] == {"all-reduce": 1}


def test_too_little_memory_is_one_line_and_still_written(monkeypatch, tmp_path):
    figures = FIGURES | {"fits": False, "reason": "Ran out of memory on HBM, needs (9G), available (1G)"}
    monkeypatch.setattr(compiler, "compile_in_child", lambda request, topology: figures)
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match=r"does not fit tpu7x:2x2x1.*mesh\.fsdp"):
        compile_for(Config(), "tpu7x:2x2x1", json_file=tmp_path / "f.json")
    assert json.loads((tmp_path / "f.json").read_text())["fits"] is False
