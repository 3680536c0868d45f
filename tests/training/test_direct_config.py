"""`configs/opus_direct.yaml`, shortened, on the tests' small corpus: a real run of the direct path."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from small_runs import lines, mapping, write_text

from opus_jax.config import Config, from_mapping
from opus_jax.distributed.mesh import make_mesh
from opus_jax.errors import ConfigError
from opus_jax.training import build
from opus_jax.training.loop import train

DIRECT = Path(__file__).parents[2] / "configs" / "opus_direct.yaml"
SHORT = {
    "run": {"steps": 9, "eval_every": 9, "save_every": 9},
    "selection": {"warm_start_steps": 2, "select_every": 3, "audit_every": 3, "audit_rows": 4},
    "feedback": {"window_steps": 2, "clusters": 8},
}


def shortened(root: Path, run: str) -> Config:
    """Its selection, feedback and optimizer; the small runs' text and model."""
    small = {name: mapping(root, run)[name] for name in ("corpus", "tokenizer", "model", "proxy", "evaluation", "run")}
    small["proxy"]["rows"] = 16
    whole = Config.load(DIRECT).to_mapping()
    return from_mapping({name: whole[name] | small.get(name, {}) | SHORT.get(name, {}) for name in whole})


def test_it_is_the_plain_reading_of_the_method() -> None:
    config = Config.load(DIRECT)
    selection = config.selection
    assert (config.optimizer.name, selection.engine, selection.sketch) == ("adamw", "per_example", "count")
    assert (selection.direction, selection.preconditioner, selection.sketch_width) == ("adamw_frozen", "exact", 8192)
    assert selection.sketched_utilities
    assert selection.redundancy > 0
    assert config.feedback.enabled
    assert selection.score_chunk is not None


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("direct")
    write_text(folder / "text")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_it_trains_and_steers_the_stream(devices: int, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "make_mesh", lambda config: make_mesh(config, jax.devices()[:devices]))
    summary = train(shortened(root, f"on_{devices}"), progress=False)
    logged: list[dict[str, Any]] = lines(root / f"on_{devices}")
    scored = [line for line in logged if line.get("utility_sd")]
    assert [line["step"] for line in scored] == [3, 6, 9]
    assert np.isfinite(summary["target_bits_per_byte"])
    audits = [(x["audit_rank_agreement"], x["audit_products_agreement"]) for x in scored]
    assert min(min(pair) for pair in audits) > 0.9, "sketches that are wider than the matrices lose nothing"
    assert list((root / f"on_{devices}" / "decisions").glob("*.json")), "feedback is on"


def test_chunks_of_sketches_fill_the_mesh(tmp_path: Path) -> None:
    selection = {"engine": "ghost", "sketch": "kron", "score_chunk": 4}
    with pytest.raises(ConfigError, match=r"selection\.score_chunk = 4.*multiple of the 8 data shards"):
        train(from_mapping(mapping(tmp_path) | {"selection": selection}), progress=False)
