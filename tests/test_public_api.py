"""`import opus_jax as oj`: what it offers, and that it starts nothing by itself."""

import subprocess
import sys

import opus_jax as oj
from opus_jax.config import Config
from opus_jax.reports.run import load_run
from opus_jax.training.loop import train


def test_every_name_is_the_one_of_its_room() -> None:
    assert (oj.Config, oj.train, oj.load_run) == (Config, train, load_run)
    assert all(getattr(oj, name) is not None for name in oj.__all__)
    assert set(oj.__all__) <= set(dir(oj))


def test_importing_starts_neither_jax_nor_a_device() -> None:
    code = "import sys, opus_jax; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
