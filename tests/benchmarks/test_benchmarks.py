"""Small forms of the benchmarks: they measure the step that trains, and count as they say."""

from pathlib import Path

import pytest

from benchmarks import framework_overhead, score_quality
from benchmarks.harness import alternate, summarise
from opus_jax.config import from_mapping
from opus_jax.training import build, lower_step, step


def test_one_step_serves_training_benchmarks_and_compilation() -> None:
    for module in (build, lower_step, framework_overhead):
        assert module.make_step is step.make_step
    assert score_quality.build is build.build


@pytest.mark.slow
def test_the_bare_step_computes_the_same_loss() -> None:
    config = framework_overhead._config()
    spec = framework_overhead.resolve(config.model, 2048, 128)
    rows = framework_overhead._rows(config)
    ours, bare = (make(spec, config, rows) for make in (framework_overhead._ours, framework_overhead._bare))
    for _ in range(2):
        assert ours(1) == pytest.approx(bare(1), abs=1e-4)


@pytest.mark.slow
def test_score_quality_finds_that_utilities_rank_candidates(tmp_path: Path, small_run: dict) -> None:
    config = from_mapping(
        small_run,
        [
            "selection.method=opus",
            "selection.temperature=.inf",
            "selection.audit_every=0",
            "optimizer.learning_rate=0.003",
        ],
    )
    found = dict(score_quality._agreements(config, every=6, count=1))
    assert set(found) == {f"{key}.adamw.{mode}" for key in score_quality.SCALES for mode in score_quality.MODES}
    assert found["spearman.adamw.vjp"] > 0.8
    assert found["spearman.adamw.vjp"] > found["spearman.adamw.identity"]


def test_summaries_and_ratios() -> None:
    assert summarise([1.0, 2.0, 3.0]) == {"mean": 2.0, "sd": 1.0, "n": 3, "values": [1.0, 2.0, 3.0]}
    assert summarise([1.0, None])["mean"] is None, "a repetition that was never reached is not left out of the mean"
    assert len(alternate(lambda: None, lambda: None, pairs=5)) == 5
