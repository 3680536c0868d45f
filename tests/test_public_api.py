"""`import opus_jax as oj`: what it offers, and that it starts nothing by itself."""

import subprocess
import sys

import grain
import numpy as np

import opus_jax as oj
from opus_jax.config import Config
from opus_jax.reports.run import load_run
from opus_jax.training.loop import train


def test_every_name_is_the_one_of_its_room() -> None:
    assert (oj.Config, oj.train, oj.load_run) == (Config, train, load_run)
    assert all(getattr(oj, name) is not None for name in oj.__all__)
    assert set(oj.__all__) <= set(dir(oj))


def test_scores_steer_anyones_dataset() -> None:
    """Elements of 3 domains, of which one is good: after some rounds of feedback it is what mostly comes."""
    dice = np.random.default_rng(0)
    domain_ids = dice.integers(0, 3, 300)
    dataset = grain.MapDataset.source([{"id": i, "worth": float(g == 1)} for i, g in enumerate(domain_ids)])
    state, plan = oj.feedback.start(3), oj.fit(oj.Plan(np.ones(3)), domain_ids)
    slot, shares = 0, []
    for _ in range(8):
        stream = oj.candidates(dataset, plan, 7, domain_ids=domain_ids)
        batch = [stream[slot - plan.first_slot + i] for i in range(32)]
        drawn = domain_ids[[element["id"] for element in batch]]
        utilities = np.array([element["worth"] for element in batch]) + 0.5 * dice.normal(size=32)
        shares.append((drawn == 1).mean())
        slot += 32
        state, wanted = oj.feedback.update(state, utilities, drawn)
        plan = oj.advance(plan, slot, wanted.domain_weights, wanted.priorities)
    assert shares[0] < 0.5
    assert shares[-1] > 0.7
    assert plan.drawn.sum() == slot


def test_importing_starts_neither_jax_nor_a_device() -> None:
    code = "import sys, opus_jax; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
