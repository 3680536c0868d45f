"""pod_scaling: figures from compiled ones, and weak scaling really compiled at small dimensions."""

from typing import Any

import pytest

from benchmarks import pod_scaling
from benchmarks.pod_scaling import (
    SLICES,
    WEAK_SHAPES,
    kept,
    markdown,
    pod_figures,
    pod_jobs,
    weak_config,
    weak_figures,
)
from opus_jax.distributed.mesh import mesh_shape
from opus_jax.distributed.topology import parse_topology
from opus_jax.training.lower_step import model_spec
from opus_jax.training.overhead_budget import within_budget


def compiled(name: str, *, apart: float, plain: float, communicated: int) -> dict[str, Any]:
    """Figures as `compile` gives them, with overlap a tenth faster."""

    def step(seconds: float, moved: int) -> dict[str, Any]:
        times = {"apart": seconds, "overlapped": 0.9 * seconds}
        mfu = {"apart": 0.4, "overlapped": 0.44}
        return {
            "fits": True,
            "peak_bytes": 8 * 10**9,
            "seconds": times,
            "mfu": mfu,
            "collective_bytes": moved,
        }

    return {
        "topology": SLICES["v5p-64"], "chips": 32, "devices_per_chip": 1, "hbm_bytes": 95 * 2**30, "fits": True,
        "steps": {"train": step(apart, communicated), "plain": step(plain, 10**9)},
        "selection_share": {"seconds_apart": 1 - plain / apart}, "mesh": {"data": 4, "fsdp": 8}, "select_every": 2,
    }  # fmt: skip


@pytest.mark.parametrize("job", pod_jobs(quick=False), ids=lambda job: job.name)
def test_the_pods_configurations_have_rows_and_shapes_for_their_slices(job: Any) -> None:
    topology = parse_topology(job.topology)
    replica, data, fsdp, tensor = mesh_shape(job.config.mesh, topology.devices)
    shards = replica * data * fsdp
    spec = model_spec(job.config)
    assert job.name.startswith(job.config.model.preset.replace("-", "_"))
    assert spec.width % fsdp == 0, "a dimension that its axis does not divide would be whole on every chip"
    assert tensor == 1
    for rows in (job.config.batch.rows, job.config.candidates, job.config.proxy.rows, job.config.batch.microbatch):
        assert rows is None or rows % shards == 0
    assert within_budget(spec, job.config).selection.window < job.config.corpus.row_tokens


def test_weak_scaling_keeps_the_rows_of_a_chip() -> None:
    for chips, shape in WEAK_SHAPES.items():
        config = weak_config(chips, quick=False)
        assert parse_topology(shape).devices == chips
        assert (config.batch.rows / chips, config.proxy.rows / chips) == (16, 2)
        assert mesh_shape(config.mesh, chips)[1] > 1, "else data-parallel reductions would first appear at 64 chips"


def test_figures_are_ratios_of_what_was_compiled() -> None:
    scaling = {
        8: compiled("weak-8", apart=1.0, plain=0.8, communicated=3 * 10**9),
        64: compiled("weak-64", apart=1.05, plain=0.8, communicated=3 * 10**9),
        512: compiled("weak-512", apart=1.1, plain=0.8, communicated=5 * 10**9),
    }
    figures = weak_figures(scaling)
    assert figures["selection_bytes_ratio.8_64"] == [1.0]
    assert figures["selection_bytes_ratio.8_512"] == [2.0]
    assert figures["step_time_ratio.8_512"] == [pytest.approx(1.1)]
    assert figures["step_time_ratio_overlapped.8_64"] == [pytest.approx(1.05)]
    assert figures["selection_share.8"] == [pytest.approx(0.2)]


def test_what_does_not_fit_is_null_and_said() -> None:
    fine = compiled("a", apart=1.0, plain=0.8, communicated=10**9)
    unfit = fine | {"fits": False, "steps": {"train": {"fits": False}, "plain": fine["steps"]["plain"]}}
    figures = pod_figures({"a": fine, "b": unfit})
    assert figures["hbm_gb.a"] == [8.0]
    assert figures["selection_overhead.a"] == [pytest.approx(0.125)], "one step in two chooses"
    assert figures["hbm_gb.b"] == figures["mfu_overlapped.b"] == [None]
    table = markdown({"a": fine, "b": unfit})
    assert "| a | 32 | 7.5 of 95.0 GiB | 0.90 to 1.00 s | 44% to 40% | 12% to 12% |" in table
    assert "| b | 32 | does not fit 95.0 GiB |" in table


def test_what_was_compiled_is_kept(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(pod_scaling, "figures_for", lambda *request: asked.append(request) or {"fits": True})
    job = pod_jobs(quick=True)[0]
    assert kept(job, tmp_path) == kept(job, tmp_path) == {"fits": True}
    assert len(asked) == 1
    assert len(list(tmp_path.iterdir())) == 1
