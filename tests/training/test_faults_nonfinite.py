"""A loss that is not finite: what the step leaves as it was, and what the run counts."""

from typing import Any

import jax
import numpy as np
import pytest
from small_runs import lines, small_config
from test_step import Run, config, host, rows

from opus_jax.errors import NonFiniteLossError
from opus_jax.training import loop
from opus_jax.training.feed import put_rows
from opus_jax.training.loop import train


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_a_skipped_update_changes_nothing_but_the_step(optimizer: str) -> None:
    run = Run(config("run.on_nonfinite=skip", f"optimizer.name={optimizer}", "selection.method=random"), devices=2)
    state, metrics = run.step(run.state, put_rows(rows(16, 0), run.mesh), None)
    assert not metrics["skipped"]
    before, key = host((state.params, state.opt_state)), np.array(jax.random.key_data(state.key))
    bad = {name: x if name != "loss_mask" else x * np.nan for name, x in rows(16, 1).items()}
    state, metrics = run.step(state, put_rows(bad, run.mesh), None)
    assert metrics["skipped"]
    assert not np.isfinite(metrics["loss"])
    assert metrics["update_tokens"] == 0
    assert int(state.step) == 2
    jax.tree.map(np.testing.assert_array_equal, before, host((state.params, state.opt_state)))
    np.testing.assert_array_equal(key, jax.random.key_data(state.key))
    state, metrics = run.step(state, put_rows(rows(16, 2), run.mesh), None)
    assert np.isfinite(metrics["loss"])
    assert not metrics["skipped"]


@pytest.mark.slow
def test_a_direction_outlives_a_skipped_update() -> None:
    """The gradients that the next direction is made of are those of the last sound step."""
    run = Run(config("run.on_nonfinite=skip", "proxy.ema=0.5"))
    run.go(2)
    before = host((run.state.reference_gradient, run.state.proxy_gradient))
    bad = {name: x if name != "loss_mask" else x * np.nan for name, x in rows(16, 1).items()}
    state, metrics = run.step(run.state, put_rows(bad, run.mesh), put_rows(rows(8, 9), run.mesh))
    assert metrics["skipped"]
    jax.tree.map(np.testing.assert_array_equal, before, host((state.reference_gradient, state.proxy_gradient)))


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Poisons the batches of the given steps on their way to the devices."""

    def at(*steps: int) -> None:
        class PoisonedFeed(loop.Feed):
            taken = 0

            def take(self) -> Any:
                fed = super().take()
                self.taken += 1
                if self.taken not in steps:
                    return fed
                mask = fed.device["loss_mask"].at[0, 1].set(np.nan)
                return loop.Fed(fed.device | {"loss_mask": mask}, fed.host)

        monkeypatch.setattr(loop, "Feed", PoisonedFeed)

    return at


PLAIN = ("selection.method=none", "run.steps=6", "run.eval_every=6", "run.save_every=2")


def test_skipped_updates_are_counted_and_survive_a_resume(tmp_path: Any, poison: Any) -> None:
    poison(3, 4)
    skipping = small_config(tmp_path, *PLAIN, "run.on_nonfinite=skip", "run.max_skipped=2")
    summary = train(skipping, progress=False)
    assert summary["skipped_updates"] == 2
    logged = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert [line["skipped_updates"] for line in logged] == [0, 0, 1, 2, 2, 2]
    assert [line["step"] for line in logged if line["loss"] is None] == [3, 4], "the digests take them in too"


@pytest.mark.slow
def test_one_skip_too_many_stops_the_run_and_stop_may_be_changed_to_skip(tmp_path: Any, poison: Any) -> None:
    poison(3, 4)
    with pytest.raises(NonFiniteLossError, match=r"nan at step 3, on rows \[.*run.on_nonfinite=skip"):
        train(small_config(tmp_path, *PLAIN), progress=False)
    poison(1, 2)  # the same steps, counted from the checkpoint of step 2 on
    skipping = (*PLAIN, "run.on_nonfinite=skip")
    with pytest.raises(NonFiniteLossError, match=r"2 updates were left out, run.max_skipped = 1"):
        train(small_config(tmp_path, *skipping, "run.max_skipped=1"), progress=False)
    assert train(small_config(tmp_path, *skipping), progress=False)["skipped_updates"] == 2


@pytest.mark.slow
def test_without_anything_to_skip_the_setting_changes_nothing(tmp_path: Any) -> None:
    stop, skip = (
        train(small_config(tmp_path, *PLAIN, f"run.on_nonfinite={policy}", run=policy), progress=False)
        for policy in ("stop", "skip")
    )
    assert stop["batch_digest"] == skip["batch_digest"]
    losses = [[line["loss"] for line in lines(tmp_path / policy) if "loss" in line] for policy in ("stop", "skip")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
