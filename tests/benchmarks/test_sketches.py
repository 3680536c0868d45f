"""sketches: methods sketch the same gradients, the floor has no weight gradients, ratios are what they say."""

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import small_config

from benchmarks.sketching import fidelity, speed, traffic
from benchmarks.sketching.stack import merge, split
from opus_jax.influence.per_example import per_example_gradients
from opus_jax.influence.sketch import CountSketch, KronSketch
from opus_jax.training.build import build

SIZE = speed.Size(layers=2, rows=4, tokens=16, parts=2, chunks=(1, 2), rounds=3, trial_layers=1, preset="tiny")


@pytest.fixture(scope="module")
def subject() -> speed.Subject:
    return speed._subject(SIZE, SIZE.layers)


@pytest.fixture(scope="module")
def rows() -> jax.Array:
    return speed._inputs(SIZE, SIZE.rows)


@pytest.fixture(scope="module")
def gradients(subject: speed.Subject, rows: jax.Array) -> list[np.ndarray]:
    """float64[N, L, D, F] of every matrix."""
    found = jax.jit(partial(per_example_gradients, subject.losses))(subject.matrices, rows)
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(found)]


def gram(sketches: Any) -> np.ndarray:
    flat = np.asarray(sketches, np.float64).reshape(len(sketches), -1)
    return flat @ flat.T


@pytest.mark.parametrize("name", [speed.OURS, "vmap_stride"])
def test_sketches_of_the_same_gradients(
    name: str, subject: speed.Subject, rows: jax.Array, gradients: list[np.ndarray]
) -> None:
    """No matrix of so small a model is larger than a sketch but the three of the MLP: 64 x 192."""
    found = jax.jit(speed.METHODS[name])(subject, rows)
    assert found.shape == (SIZE.rows, SIZE.layers * len(gradients), speed.WIDTH)
    whole = [np.prod(g.shape[2:]) <= speed.WIDTH for g in gradients]
    assert any(whole)
    layer = np.repeat(whole, SIZE.layers)
    exact = sum(gram(g) for g, fits in zip(gradients, whole, strict=True) if fits)
    assert gram(found[:, layer]) == pytest.approx(exact, rel=1e-4, abs=1e-6 * np.max(exact))


def test_the_official_scheme_adds_every_coordinate_to_its_bucket(
    subject: speed.Subject, rows: jax.Array, gradients: list[np.ndarray]
) -> None:
    found = np.asarray(jax.jit(speed.METHODS["official_scheme"])(subject, rows), np.float64)
    tables = jax.tree.leaves(subject.tables, is_leaf=lambda x: isinstance(x, tuple))
    expected = []
    for table, gradient in zip(tables, gradients, strict=True):
        bucket, sign, diagonal = (np.asarray(x) for x in table)
        for layer in range(SIZE.layers):
            out = np.zeros((speed.WIDTH, SIZE.rows))
            signed = gradient[:, layer] * (sign * diagonal)[layer]
            np.add.at(out, bucket[layer].reshape(-1), signed.reshape(SIZE.rows, -1).T)
            expected.append(out.T)
    assert found == pytest.approx(np.stack(expected, axis=1), rel=1e-4, abs=1e-5 * np.abs(found).max())


def test_the_floor_has_no_weight_gradients() -> None:
    wide = speed.Size(layers=2, rows=2, tokens=32, parts=1, chunks=(1,), rounds=1, trial_layers=1)
    assert 1.9 < speed.flop_ratios(wide)[f"flops_over_forward.{speed.FLOOR}"][0] < 2.3, "they would make it 3"


def test_each_round_is_a_ratio_of_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = {name: lambda subject, x: jnp.sum(x, axis=(1, 2)) for name in speed.METHODS}
    monkeypatch.setattr(speed, "METHODS", sums)
    found, figures = speed.measure_speed(SIZE)
    assert set(found["rows_at_once"].values()) <= {1, 2}
    assert {len(values) for values in figures.values()} == {SIZE.rounds}
    seconds = {name: figures[f"seconds_per_row.{name}"] for name in sums}
    best = np.minimum(seconds["vmap_stride"], seconds["vmap_hash"])
    assert figures["speedup.vmap"] == pytest.approx(best / seconds[speed.OURS])
    over_floor = np.divide(seconds[speed.OURS], seconds[speed.FLOOR])
    assert figures["time_over_activation_backward"] == pytest.approx(over_floor)


def test_a_tree_in_two_parts_is_whole_again(subject: speed.Subject) -> None:
    whole = merge(subject.matrices, subject.fixed)
    matrices, fixed = split(whole)
    assert jax.tree.structure(matrices) == jax.tree.structure(subject.matrices)
    assert {leaf.ndim for leaf in jax.tree.leaves(matrices)} == {3}
    assert {leaf.ndim for leaf in jax.tree.leaves(fixed)} == {2}


@pytest.mark.slow
def test_fidelity_is_full_where_matrices_fit_and_less_where_they_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "CANDIDATES", 8)
    sketches = {
        "whole": (CountSketch(10_000), "exact"),
        "narrow": (KronSketch(1, 4), "exact"),
        "root": (CountSketch(10_000), "root"),
    }
    monkeypatch.setattr(fidelity, "SKETCHES", sketches)
    parts = build(small_config(tmp_path, "selection.method=random"), progress=False)
    found: dict[str, list[dict[str, float]]] = {}
    for name, figures in fidelity.agreements(fidelity.trained(parts, 2), seeds=2):
        found.setdefault(name, []).append(figures)
    assert {name: len(values) for name, values in found.items()} == {"factored": 1, "whole": 2, "narrow": 2, "root": 2}
    assert found["root"][0]["gram_error.all"] < 1e-5, "R R = P"
    assert found["root"][0]["spearman.all"] == pytest.approx(1)
    for whole, narrow in zip(found["whole"], found["narrow"], strict=True):
        assert whole["spearman"] == pytest.approx(1)
        for subset in ("", ".all"):
            assert whole[f"gram_error{subset}"] < 1e-5 < 1e-2 < narrow[f"gram_error{subset}"]
    assert 1e-3 < found["factored"][0]["gram_error"] < 1
    assert found["narrow"][0] != found["narrow"][1], "a seed of its own each"


def test_the_largest_buffer_is_one_that_is_written() -> None:
    program = """
%fused_computation (param_0: f32[4,4]) -> f32[900] {
  %param_0 = f32[4,4]{1,0:T(8,128)} parameter(0)
  ROOT %inside = f32[900]{0} broadcast(%param_0)
}

ENTRY %main (p: f32[1000]) -> (bf16[8,4]) {
  %p = f32[1000]{0} parameter(0)
  %written = (f32[3,5]{1,0:T(8,128)(2,1)}, bf16[8,4]{1,0}) fusion(%p), kind=kLoop, calls=%fused_computation
  ROOT %all = (bf16[8,4]{1,0}) tuple(%written)
}
"""
    assert traffic.largest_buffer(program) == max(4 * 3 * 5, 2 * 8 * 4)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu exists for Linux x86-64 only")
def test_traffic_of_a_small_model() -> None:
    figures = traffic.measure_traffic(4, 128, {"small": "tiny"}, layers=2, width=256, hidden=512, head_dim=64)
    for kind in traffic.KINDS:
        assert 0.2 < figures[f"hbm_traffic.small.{kind}"][0] < 3
        assert figures[f"largest_buffer_ratio.small.{kind}"][0] > 0
    backward, scores = (figures[f"flops_over_forward.small.{kind}"][0] for kind in (traffic.ORDINARY, "kron_exact"))
    assert 2.5 < backward < 3.6
    assert scores > figures["flops_over_forward.small.kron"][0], "the kernel forms gradients, tile by tile"
