import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from opus_jax.config import Config, ModelConfig, from_mapping
from opus_jax.distributed import compile as compiler
from opus_jax.distributed.compile import compile_for, selection_share, smaller
from opus_jax.distributed.compile_report import describe
from opus_jax.distributed.measure import Lowered, largest_values, listed_buffers, measure
from opus_jax.distributed.topology import compiler_environment, parse_topology
from opus_jax.errors import MissingExtraError, UserError
from opus_jax.training import lower_step, score_corpus, step

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
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from opus_jax.config import MeshConfig
from opus_jax.distributed.measure import Lowered, measure
from opus_jax.distributed.mesh import make_mesh
from opus_jax.distributed.topology import absent_devices, parse_topology
topology, size = parse_topology(sys.argv[1], int(sys.argv[3])), int(sys.argv[2])
mesh = make_mesh(MeshConfig(replica=topology.slices), absent_devices(topology))
split, whole = (NamedSharding(mesh, PartitionSpec(axes)) for axes in (("replica", "data"), None))
x = jax.ShapeDtypeStruct((topology.devices, size, size), jnp.float32, sharding=split)
lowered = jax.jit(lambda x: jnp.tanh(x @ x).sum(0), out_shardings=whole).lower(x)
print(json.dumps(measure(Lowered(lowered, mesh), topology)))
"""


def compile_toy(name, size=128, slices=1):
    environment = os.environ | compiler_environment(parse_topology(name))
    asked = [sys.executable, "-c", TOY, name, str(size), str(slices)]
    done = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == ""
    return json.loads(done.stdout)


@with_libtpu
def test_two_compilations_at_once_with_exact_sizes():
    names = ["v5e:2x2", "v5p:2x2x1"]
    with ThreadPoolExecutor(2) as pool:
        both = dict(zip(names, pool.map(compile_toy, names), strict=True))
    for figures in both.values():
        assert figures["arguments_bytes"] == 128 * 128 * 4
        assert figures["outputs_bytes"] == 128 * 128 * 4
        assert figures["flops"] == 2 * 128**3
        assert figures["collectives"] == [{"kind": "all-reduce", "axes": ["data"], "bytes": 128 * 128 * 4, "count": 1}]
        assert 0 < figures["seconds"]["overlapped"] < figures["seconds"]["apart"] < 1e-4


@with_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5p:2x2x1", "v5e:2x2", "v6e:2x2", "v4:2x2x1", "tpu7x:2x2x1"])
def test_two_slices_talk_along_the_replica_axis(name):
    one, two = compile_toy(name), compile_toy(name, slices=2)
    assert {axis for found in two["collectives"] for axis in found["axes"]} == {"replica", "data"}
    assert two["seconds"]["communication"] > one["seconds"]["communication"] + 50e-6, "the way to the other slice"


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
def test_the_real_steps_compile_and_are_described(tmp_path, capsys):
    file = tmp_path / "figures.json"
    figures = compile_for(from_mapping(TINY), "v5e:2x2", json_file=file)
    assert json.loads(file.read_text()) == figures
    assert list(figures["steps"]) == ["train", "plain", "score", "decode"]
    for found in figures["steps"].values():
        assert found["kernels"] == {}, "nothing is sketched"
        assert 0 < found["peak_bytes"] < figures["hbm_bytes"]
        assert 0 < found["mfu"]["apart"] <= found["mfu"]["overlapped"] < 1
    assert figures["steps"]["plain"]["flops"] * 4 == pytest.approx(figures["steps"]["plain"]["useful_flops"], rel=0.02)
    assert figures["steps"]["train"]["collective_bytes"] > figures["steps"]["plain"]["collective_bytes"]
    assert 0 < figures["selection_share"]["flops"] < 1
    told = capsys.readouterr().out
    assert all(f"{name} step" in told for name in figures["steps"])


@with_libtpu
@pytest.mark.slow
def test_rows_that_do_not_fit_are_told_with_the_largest_buffers_and_what_would_fit(tmp_path):
    wide = TINY | {
        "model": {"preset": "tiny", "width": 2048, "layers": 8, "heads": 8, "hidden": 8192, "vocab_size": 32768},
        "corpus": {"row_tokens": 1024}, "batch": {"rows": 64}, "selection": {"method": "none"},
    }  # fmt: skip
    file = tmp_path / "figures.json"
    with pytest.raises(
        UserError, match=r"does not fit v5e:2x2: plain step: .*largest on a device: .*GiB.*it fits with"
    ):
        compile_for(from_mapping(wide), "v5e:2x2", steps=("plain",), suggest=True, json_file=file)
    assert "model.remat=full" in json.loads(file.read_text())["fitting_changes"]


SKETCHED = {"sketch": "count", "sketch_width": 64, "sketched_utilities": True, "direction": "adamw_frozen"}


@with_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("engine", "kernel"), [("ghost", "ghost_sketch"), ("per_example", "count_sketch")])
def test_sketches_of_the_real_step_are_our_kernels(engine, kernel):
    """With AdamW's exact diagonal; those of the ghost engine lie within the scanned backward pass."""
    selection = TINY["selection"] | SKETCHED | {"engine": engine, "redundancy": 0.5}
    figures = compile_for(from_mapping(TINY | {"selection": selection}), "v5e:2x2", steps=("train",))["steps"]["train"]
    found = figures["kernels"][kernel]
    assert found["calls"] >= 7, "as many matrices as a block has"
    assert 0 < found["flops"] < figures["flops"]
    assert 0 < found["bytes"] < figures["moved_bytes"]


@with_libtpu
@pytest.mark.slow
def test_the_direct_configuration_has_our_kernels_on_a_pod_slice(capsys):
    figures = compile_for(Config.load(CONFIGS / "opus_direct.yaml"), "v5p:2x2x4", steps=("train",))["steps"]["train"]
    assert set(figures["kernels"]) == {"count_sketch"}
    assert figures["kernels"]["count_sketch"]["calls"] > 0
    assert "count_sketch: " in capsys.readouterr().out


@with_libtpu
def test_a_batch_that_does_not_divide_is_the_users_mistake():
    with pytest.raises(UserError, match=r"v5e:2x4.*batch\.rows = 4.*multiple of the 8 data shards"):
        compile_for(from_mapping(TINY), "v5e:2x4")


@with_libtpu
@pytest.mark.slow
def test_slices_that_the_replicas_do_not_fill_are_the_users_mistake():
    with pytest.raises(UserError, match=r"2 x v5e:2x2.*mesh\.replica = 1.*multiple of the 2 TPU slices"):
        compile_for(from_mapping(TINY), "v5e:2x2", slices=2)


def test_the_steps_are_those_that_run():
    assert lower_step.make_step is step.make_step
    assert lower_step.segment_scorer is score_corpus.segment_scorer


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        ("opus", ["train", "plain", "score", "decode"]),
        ("high_loss", ["train", "plain", "decode"]),
        ("random", ["plain", "decode"]),
    ],
)
def test_only_what_a_run_has_is_compiled(method, steps):
    assert lower_step.steps_of(from_mapping(TINY, [f"selection.method={method}"])) == steps


def test_an_unknown_step_is_told_before_libtpu_is_looked_for(monkeypatch):
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--steps evaluate: must be among train,plain,score,decode"):
        compile_for(Config(), "v5e:2x2", steps=("plain", "evaluate"))


def test_a_step_that_the_run_does_not_have_is_the_users_mistake(monkeypatch):
    import jax

    monkeypatch.setattr(lower_step, "absent_devices", lambda topology: jax.devices()[:4])
    config = from_mapping(TINY, ["selection.method=random"]).to_mapping()
    with pytest.raises(UserError, match=r"--steps train,score: this configuration has plain,decode"):
        lower_step.answer({"config": config, "topology": "v5e:2x2", "slices": 1, "steps": ["train", "plain", "score"]})


def test_lowering_needs_only_shapes():
    import jax

    lowered = lower_step.workshop(from_mapping(TINY), jax.devices()[:2]).train()
    assert lowered.arguments[0][1] > 0
    state, candidates, proxy = lowered.program.args_info[0]
    assert candidates["tokens"].shape == (8, 32)
    assert proxy["tokens"].shape == (4, 32)
    assert state.reference_gradient is not None


def test_more_parameters_than_int32_counts_can_be_lowered():
    import jax

    config = Config.load(CONFIGS / "pods" / "llama3_8b_opus_v5p-64.yaml", ["mesh.fsdp=8"])
    lowered = lower_step.workshop(config, jax.devices()).train()
    assert sum(size for _, size in lowered.arguments) * 8 > 5 * 4 * 2**31, "five float32 of each parameter"


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


STEP = {
    "fits": True, "compile_seconds": 1.0, "arguments_bytes": 2**30, "outputs_bytes": 2**30, "aliased_bytes": 2**30,
    "temporaries_bytes": 2**30, "program_bytes": 0, "peak_bytes": 2 * 2**30, "flops": 10**9,
    "moved_bytes": 2**30, "collectives": [], "collective_bytes": 0, "kernels": {}, "unknown_loops": 0, "every": 1,
    "seconds": {"compute": 0.25, "communication": 0.05, "apart": 0.3, "overlapped": 0.25},
    "longest_seconds": {"apart": 0.9, "overlapped": 0.75}, "useful_flops": 10**9,
    "mfu": {"apart": 0.5, "overlapped": 0.6},
}  # fmt: skip
FIGURES = {
    "topology": "tpu7x:2x2x1", "slices": 1, "chips": 4, "devices": 8, "devices_per_chip": 2, "hbm_bytes": 90 * 2**30,
    "mesh": {"replica": 1, "data": 8, "fsdp": 1, "tensor": 1}, "fits": True, "selection_share": {}, "select_every": 1,
    "steps": {"plain": STEP},
}  # fmt: skip
UNFIT = {"fits": False, "reason": "Ran out of memory on HBM, needs (9G), available (1G)", "largest": [], "held": []}


def with_step(**changes):
    return FIGURES | {"steps": {"plain": STEP | changes}}


def test_kernels_are_printed_with_their_shares():
    kernel = {"calls": 3, "flops": 5 * 10**8, "bytes": 2**28}
    text = describe(with_step(kernels={"count_sketch": kernel}))
    assert "count_sketch: 3 calls, 0.25 GiB moved (25.0%), 50.0% of the FLOPs" in text


def test_a_chip_of_two_devices_holds_twice_as_much():
    text = describe(FIGURES)
    assert "kernels: none" in text
    assert "collectives: none" in text
    assert "HBM per chip: 4.00 GiB of 180.00 GiB at the peak (2.2%)" in text
    assert "mesh replica 1 x data 8 x fsdp 1 x tensor 1" in text
    assert "expected: 300 ms (work 250 ms, communication 50 ms), 250 ms where they overlap; MFU 50.0%, 60.0%" in text


def test_collectives_are_printed_by_kind_and_axes_and_the_mean_is_told_from_the_longest():
    found = [
        {"kind": "all-gather", "axes": ["data", "fsdp"], "bytes": 2**20, "count": 12},
        {"kind": "all-gather", "axes": ["data", "fsdp"], "bytes": 2**19, "count": 2},
        {"kind": "all-reduce", "axes": ["data"], "bytes": 4, "count": 1},
    ]
    text = describe(with_step(collectives=found, every=20))
    assert "all-gather over data+fsdp: 14, 13.0 MiB in all" in text
    assert "all-reduce over data: 1, 0.0 MiB in all" in text
    assert "one in 20 refreshes the proxy gradient and takes 900 ms, 750 ms" in text


def test_selections_share_is_what_the_plain_step_lacks():
    seconds = {"compute": 0.5, "communication": 0.1, "apart": 0.6, "overlapped": 0.5}
    train = STEP | {"flops": 4 * 10**9, "collective_bytes": 100, "seconds": seconds}
    shares = selection_share({"train": train, "plain": STEP | {"collective_bytes": 80}})
    assert shares["flops"] == 0.75
    assert shares["seconds_apart"] == shares["seconds_overlapped"] == 0.5
    assert shares["collective_bytes"] == pytest.approx(0.2)
    assert selection_share({"train": train}) == selection_share({"train": train, "plain": UNFIT}) == {}
    told = describe(FIGURES | {"selection_share": shares, "select_every": 4})
    assert "choosing is 75.0% of the FLOPs" in told
    assert "of a step that does (one step in 4 chooses)" in told


def test_donated_arguments_are_not_counted_twice():
    stats = SimpleNamespace(
        argument_size_in_bytes=100, output_size_in_bytes=90, alias_size_in_bytes=80, temp_size_in_bytes=7,
        generated_code_size_in_bytes=3,
    )  # fmt: skip
    compiled = SimpleNamespace(memory_analysis=lambda: stats, as_text=lambda: "ENTRY %m () -> f32[] {\n}\n")
    mesh = SimpleNamespace(shape={"data": 4}, devices=np.zeros(4))
    lowered = Lowered(SimpleNamespace(compile=lambda: compiled), mesh)
    figures = measure(lowered, parse_topology("v5e:2x2"))
    assert figures["peak_bytes"] == 100 + 90 - 80 + 7 + 3
    assert figures["collectives"] == []


def unfit(monkeypatch, **changes):
    answers = {"mesh": FIGURES["mesh"], "select_every": 1, "steps": {"train": UNFIT | changes}}
    monkeypatch.setattr(compiler, "compile_in_child", lambda request, topology: answers)
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: object())


def test_too_little_memory_is_one_line_and_still_written(monkeypatch, tmp_path):
    held = [{"name": "float32[8, 9] .params['head']", "bytes": 2**31}]
    unfit(monkeypatch, held=held)
    with pytest.raises(
        UserError, match=r"fit tpu7x:2x2x1: train step.*head'\] \(2.00 GiB\).*mesh\.fsdp.*--suggest"
    ) as told:
        compile_for(Config(), "tpu7x:2x2x1", json_file=tmp_path / "f.json")
    assert "\n" not in str(told.value)
    assert json.loads((tmp_path / "f.json").read_text())["fits"] is False


def test_settings_that_fit_are_looked_for_on_request(monkeypatch):
    unfit(monkeypatch)
    tried = []

    def answer(request, topology):
        tried.append((request["config"]["model"]["remat"], request["config"]["mesh"]["fsdp"], request["steps"]))
        return {
            "mesh": {},
            "select_every": 1,
            "steps": {"train": STEP if request["config"]["mesh"]["fsdp"] == 8 else UNFIT},
        }

    monkeypatch.setattr(compiler, "compile_in_child", answer)
    with pytest.raises(UserError, match=r"it fits with model\.remat=full batch\.microbatch=8 .*mesh\.fsdp=8$"):
        compile_for(Config(), "tpu7x:2x2x1", suggest=True)
    assert tried[0] == ("none", 1, [])
    assert tried[-1] == ("full", 8, ["train"])


def test_the_changes_tried_need_less_and_less():
    config = from_mapping(TINY | {"batch": {"rows": 32, "microbatch": 8}, "mesh": {"replica": 2}})
    assert list(smaller(config, 8)) == [
        ["model.remat=full"],
        ["model.remat=full", "selection.score_chunk=8"],
        ["model.remat=full", "selection.score_chunk=8", "mesh.data=1", "mesh.fsdp=4"],
    ]
    assert list(smaller(config, 4))[1] == ["model.remat=full", "batch.microbatch=4"]


def test_the_buffers_that_the_compiler_lists_are_read_largest_first():
    message = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.1G of 15.75G hbm.
  1. Size: 512.0M
     Operator: op_name="jit(step)/dot_general" stack_frame_id=9
     Shape: f32[8,25,1024,1024]{3,2,1,0:T(8,128)}
     XLA label: fusion.9 = fusion(x), kind=kLoop
  2. Size: 1.50G
     Shape: bf16[64,1024]{1,0}
     XLA label: copy.3
"""
    assert listed_buffers(message) == [
        {"name": "bf16[64,1024] copy.3", "bytes": 3 * 2**29},
        {"name": "f32[8,25,1024,1024] jit(step)/dot_general", "bytes": 2**29},
    ]
    assert listed_buffers("RESOURCE_EXHAUSTED: too much") == []


def test_where_the_compiler_lists_nothing_the_largest_values_are_named():
    text = "%1 = stablehlo.add %0 : tensor<8x64x1024xf32> loc(#1)\n%2 = f(%1) : (tensor<8xbf16>) -> tensor<f32>"
    assert largest_values(text * 2, 4) == [
        {"name": "f32[8,64,1024] split 4 ways", "bytes": 8 * 64 * 1024},
        {"name": "bf16[8] split 4 ways", "bytes": 4},
    ]
